//! A small dataset of real images in shards of several sizes, one larger than a ranged GET.

use std::path::{Path, PathBuf};

use shard_tools::looks::index::index_foreign;
use shard_tools::manifest::Manifest;
use shard_tools::pair::Contents;
use shard_tools::store::Root;

/// Samples of each shard; the last has more than 8 MiB.
const SAMPLES: [usize; 4] = [40, 60, 60, 1000];

/// Of what webdataset allows beside image and text.
const PADDING_BYTES: usize = 5 << 10;

pub fn house() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The images of `data/stamps`, with their captions, as `(key, image, text)`.
fn stamps() -> Vec<(String, Vec<u8>, Vec<u8>)> {
    let folder = house().join("data/stamps");
    let entries = std::fs::read_dir(&folder).expect("is there").flatten();
    let mut images: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    images.retain(|path| path.extension().is_some_and(|x| x == "jpg"));
    images.sort();
    let read = |path: &Path| std::fs::read(path).expect("is read");
    let stem = |path: &Path| {
        path.file_stem()
            .expect("has one")
            .to_string_lossy()
            .into_owned()
    };
    images
        .iter()
        .map(|path| (stem(path), read(path), read(&path.with_extension("txt"))))
        .collect()
}

/// Writes the shards with index and manifest into `folder`.
pub fn write(folder: &Path) -> Manifest {
    let stamps = stamps();
    let mut number = 0;
    for (shard, samples) in SAMPLES.iter().enumerate() {
        let file = folder.join(format!("{shard:06}.tar"));
        let mut tar = tar::Builder::new(std::fs::File::create(file).expect("is made"));
        for _ in 0..*samples {
            let (key, image, text) = &stamps[number % stamps.len()];
            let large = samples == SAMPLES.iter().max().expect("there are some");
            let padding = vec![number as u8; if large { PADDING_BYTES } else { 0 }];
            for (extension, data) in [("jpg", image), ("txt", text), ("bin", &padding)] {
                let mut header = tar::Header::new_gnu();
                header.set_size(data.len() as u64);
                header.set_mode(0o644);
                let name = format!("{number:05}-{key}.{extension}");
                tar.append_data(&mut header, name, &data[..])
                    .expect("is written");
            }
            number += 1;
        }
        tar.finish().expect("is written");
    }
    let root = Root::open(&folder.display().to_string()).expect("opens");
    let runtime = tokio::runtime::Runtime::new().expect("starts");
    let manifest = runtime.block_on(index_foreign(&root, "stamps", Contents::Captions));
    let manifest = manifest.expect("is a dataset");
    assert!(manifest.shards.iter().any(|shard| shard.bytes > 8 << 20));
    manifest
}
