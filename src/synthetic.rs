//! Datasets that do not exist: their manifests alone, of any size. It refuses to know who asks.

use std::str::FromStr;

use shard_tools::manifest::{ANSWERS_FILE, DataFile, Manifest, SCHEMA_VERSION, ShardEntry, Source};
use shard_tools::pair::Contents;

/// Bytes of a made-up answer file: 3,129 answers.
const ANSWERS_BYTES: u64 = 40 << 10;
/// Bytes of a made-up shard, where nobody says otherwise.
const SHARD_BYTES: u64 = 100 << 20;

/// Sizes of made-up data.
#[derive(Clone, Copy, Debug)]
pub struct Synthetic {
    /// Images.
    pub samples: u64,
    /// Image-caption pairs.
    pub pairs: u64,
    /// Tars.
    pub shards: u64,
    /// Bytes of each.
    pub shard_bytes: u64,
}

impl FromStr for Synthetic {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split(',').map(str::parse);
        let numbers: Vec<u64> = numbers
            .collect::<Result<_, _>>()
            .map_err(|e| format!("{e}"))?;
        match numbers[..] {
            [samples, pairs, shards]
                if shards > 0 && samples >= shards && pairs >= samples && pairs >> 32 == 0 =>
            {
                Ok(Synthetic {
                    samples,
                    pairs,
                    shards,
                    shard_bytes: SHARD_BYTES,
                })
            }
            _ => Err(
                "needs SAMPLES,PAIRS,SHARDS, at least a sample a shard and a pair a sample".into(),
            ),
        }
    }
}

impl Synthetic {
    /// One of `datasets` equal datasets.
    pub fn manifest(self, datasets: u64, contents: Contents) -> Manifest {
        let share =
            |all: u64, number: u64, of: u64| (all * (number + 1) / of - all * number / of) as u32;
        let shards = self.shards / datasets;
        let (samples, pairs) = (self.samples / datasets, self.pairs / datasets);
        let sha256 = "0123456789abcdef".repeat(4);
        let entries = (0..shards).map(|number| ShardEntry {
            file: format!("{number:06}.tar"),
            index_file: format!("{number:06}.index.json"),
            bytes: self.shard_bytes,
            sha256: sha256.clone(),
            index_sha256: sha256.clone(),
            samples: share(samples, number, shards),
            pairs: share(pairs, number, shards),
            source_samples: Vec::new(),
            source_pairs: Vec::new(),
        });
        Manifest {
            schema_version: SCHEMA_VERSION,
            dataset: "synthetic".into(),
            contents,
            sources: vec![Source {
                name: "synthetic".into(),
                samples,
                pairs,
            }],
            files: files(contents),
            samples,
            pairs,
            shards: entries.collect(),
        }
    }
}

/// What lies beside shards of these contents: of questions their answers.
fn files(contents: Contents) -> Vec<DataFile> {
    if contents != Contents::Vqa {
        return Vec::new();
    }
    vec![DataFile {
        file: ANSWERS_FILE.into(),
        bytes: ANSWERS_BYTES,
        sha256: "0123456789abcdef".repeat(4),
    }]
}
