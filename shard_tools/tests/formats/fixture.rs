//! What the tests of formats share: a folder to write a publisher's files into, and a packed dataset
//! read back whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use shard_tools::manifest::Manifest;
use shard_tools::pack::{self, BadKind, Catalog, MaxBad, PackOptions, Packed};
use shard_tools::pair::Pair;
use shard_tools::store::Root;
use shard_tools::{ShardError, pair, reader, verify};

/// Different photographs, by number.
pub fn photo(number: usize) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/stamps");
    let names = [
        "3_earth",
        "5_jupiter",
        "2_venus",
        "deer",
        "owl",
        "tiger",
        "cello",
        "mouse",
    ];
    let file = folder.join(format!("{}.jpg", names[number % names.len()]));
    std::fs::read(file).expect("a photograph")
}

/// A small PNG, another for every number.
pub fn png(number: u8) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let picture = image::RgbImage::from_fn(16, 12, |x, y| image::Rgb([x as u8, y as u8, number]));
    let written = picture.write_to(&mut bytes, image::ImageFormat::Png);
    written.expect("is written");
    bytes.into_inner()
}

/// A publisher's files.
pub struct Publisher {
    folder: tempfile::TempDir,
}

impl Publisher {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        Publisher { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Self {
        let file = self.path(name);
        std::fs::create_dir_all(file.parent().expect("is below")).expect("is made");
        std::fs::write(file, bytes).expect("is written");
        self
    }

    pub fn json(&self, name: &str, value: &Value) -> &Self {
        self.write(name, value.to_string())
    }

    /// One value a line.
    pub fn lines(&self, name: &str, values: &[Value]) -> &Self {
        let lines: Vec<String> = values.iter().map(Value::to_string).collect();
        self.write(name, lines.join("\n") + "\n")
    }

    /// Packs `catalog` to `packed`, verifies it and reads it back.
    pub async fn pack(&self, catalog: Result<Catalog, ShardError>, bad: u64) -> Read {
        self.pack_to("packed", catalog, bad).await
    }

    pub async fn pack_to(
        &self,
        output: &str,
        catalog: Result<Catalog, ShardError>,
        bad: u64,
    ) -> Read {
        let output = self.text(output);
        let options = PackOptions {
            pairs_per_shard: 5,
            max_bad: MaxBad::Count(bad),
            ..PackOptions::new(output.as_str(), "fixture")
        };
        let packed = pack::pack(catalog.expect("is described"), &options).await;
        let packed = packed.expect("packs");
        assert_eq!(packed.bad.len() as u64, bad, "{:#?}", packed.bad);
        let root = Root::open(&output).expect("opens");
        let problems = verify::problems(&root).await.expect("has a manifest");
        assert!(problems.is_empty(), "{problems:#?}");
        let samples = samples(&root, &packed.manifest).await;
        Read { packed, samples }
    }
}

/// A sample as a dataset gives it back.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub images: Vec<(String, Vec<u8>)>,
    pub pairs: Vec<Pair>,
    pub source: u32,
}

impl Sample {
    pub fn texts(&self) -> Vec<&str> {
        self.pairs.iter().map(|pair| pair.text.as_str()).collect()
    }

    /// Its images' bytes.
    pub fn bytes(&self) -> Vec<&[u8]> {
        self.images
            .iter()
            .map(|(_, bytes)| bytes.as_slice())
            .collect()
    }
}

/// A packed dataset, read back by its indexes.
pub struct Read {
    pub packed: Packed,
    pub samples: BTreeMap<String, Sample>,
}

impl Read {
    pub fn keys(&self) -> Vec<&str> {
        self.samples.keys().map(String::as_str).collect()
    }

    pub fn of(&self, key: &str) -> &Sample {
        let found = self.samples.get(key);
        found.unwrap_or_else(|| panic!("no {key} in {:?}", self.keys()))
    }

    /// Kinds of what is bad, with place and reason.
    pub fn bad(&self) -> Vec<(BadKind, String)> {
        let told = |bad: &pack::Bad| (bad.kind, bad.to_string());
        self.packed.bad.iter().map(told).collect()
    }

    /// Whether exactly one bad record of this kind tells `parts`.
    pub fn tells(&self, kind: BadKind, parts: &[&str]) {
        let all = |text: &str| parts.iter().all(|part| text.contains(part));
        let bad = self.bad();
        let found = bad
            .iter()
            .filter(|(k, text)| *k == kind && all(text))
            .count();
        assert_eq!(found, 1, "{kind:?} {parts:?}: {bad:#?}");
    }

    /// How many rules left out.
    pub fn left_out(&self) -> u64 {
        self.packed.left_out.values().sum()
    }
}

async fn samples(root: &Root, manifest: &Manifest) -> BTreeMap<String, Sample> {
    let mut samples = BTreeMap::new();
    for entry in &manifest.shards {
        let tar = root.get(&entry.file).await.expect("is there");
        let index = verify::index(root, entry).await.expect("is good");
        for sample in index.samples {
            let bytes = |member| reader::member_bytes(&tar, &entry.file, member).expect("inside");
            let images = sample.images.iter();
            let images = images.map(|image| (image.name.clone(), bytes(image).to_vec()));
            let pairs = pair::pairs(&sample.text.name, bytes(&sample.text)).expect("is good");
            let read = Sample {
                images: images.collect(),
                pairs,
                source: sample.source,
            };
            assert!(samples.insert(sample.key, read).is_none(), "comes once");
        }
    }
    samples
}
