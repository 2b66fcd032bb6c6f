//! Tars and packed datasets: webdataset, img2dataset, repacking, mixing.

use serde_json::json;
use shard_tools::ShardError;
use shard_tools::pack::formats::webdataset::{self, Members};
use shard_tools::pack::formats::{Input, dataset, img2dataset, nlvr2, snli_ve};
use shard_tools::pack::{self, BadKind, PackOptions, tar_of};
use shard_tools::pair::Contents;

use crate::fixture::{Publisher, Sample, photo, png};

/// A tar as Python's `tarfile` writes names of over 100 bytes: in a PAX header before the member.
fn pax_tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in members {
        builder
            .append_pax_extensions([("path", name.as_bytes())])
            .expect("into memory");
        let mut header = tar::Header::new_ustar();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, "short", *data)
            .expect("into memory");
    }
    builder.into_inner().expect("memory does not fail")
}

fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    tar_of(
        members
            .iter()
            .map(|(name, data)| ((*name).to_owned(), *data)),
    )
}

#[tokio::test]
async fn tars_of_others_are_packed_with_what_is_odd_in_them() {
    let publisher = Publisher::new();
    let long = format!("{}/{}", "folder".repeat(12), "name".repeat(20));
    let (image, text) = (format!("{long}.JPG"), format!("{long}.txt"));
    publisher.write(
        "in/00000.tar",
        tar(&[
            ("a.JPEG", &photo(0)),
            ("a.txt", b"first\nsecond\nfirst\n"),
            ("a.json", b"{\"anything\": 1}"),
            ("b.png", &png(1)),
            ("c.jpg", &photo(2)),
            ("c.txt", b"\xFF\xFE"),
            ("d.gif", b"GIF89a"),
            ("d.txt", b"a moving one"),
            ("README", b"no extension"),
        ]),
    );
    publisher.write(
        "in/00001.tar",
        pax_tar(&[(&image, &photo(3)), (&text, b"long")]),
    );
    let cut = tar(&[
        ("e.jpg", &photo(4)),
        ("e.txt", b"kept"),
        ("f.jpg", &photo(5)),
    ]);
    publisher.write("in/00002.tar", &cut[..cut.len() - 4000]);
    let catalog = webdataset::catalog(&publisher.text("in"), Members::default()).await;
    let read = publisher.pack(catalog, 4).await;
    let mut expected = vec!["a", "e", long.as_str()];
    expected.sort_unstable();
    assert_eq!(read.keys(), expected);
    assert_eq!(read.of("a").texts(), ["first", "second"]);
    assert_eq!(read.of("a").images, [("a.jpg".to_owned(), photo(0))]);
    assert_eq!(read.of(&long).bytes(), [photo(3)]);
    read.tells(BadKind::BrokenText, &["00000.tar, sample b", "no .txt"]);
    read.tells(
        BadKind::BrokenText,
        &["00000.tar, member c.txt, offset", "UTF-8"],
    );
    read.tells(BadKind::BrokenImage, &["00000.tar, member d.gif", "a GIF"]);
    read.tells(
        BadKind::BrokenRecord,
        &["00002.tar, offset", "cut off inside member f.jpg"],
    );
    assert_eq!(
        read.left_out(),
        2,
        "a repeated caption, a member without extension"
    );
}

#[tokio::test]
async fn tars_that_count_from_0_each_need_the_tar_in_the_key() {
    let publisher = Publisher::new();
    for (number, file) in ["in/x-0.tar", "in/x-1.tar"].iter().enumerate() {
        publisher.write(
            file,
            tar(&[("000.jpg", &photo(number)), ("000.txt", b"same key")]),
        );
    }
    publisher.write(
        "in/y.tar",
        tar(&[("001.jpg", &photo(2)), ("001.txt", b"another")]),
    );
    let input = publisher.text("in");
    let read = webdataset::catalog(&input, Members::default()).await;
    let read = publisher.pack(read, 1).await;
    assert_eq!(read.keys(), ["001"]);
    read.tells(BadKind::DoubleKey, &["x-1.tar", "x-0.tar"]);
    let members = Members {
        tar_in_key: true,
        ..Members::default()
    };
    let read = webdataset::catalog(&input, members).await;
    let read = publisher.pack_to("tars", read, 0).await;
    assert_eq!(read.keys(), ["x-0/000", "x-1/000", "y/001"]);
}

#[tokio::test]
async fn img2dataset_tars_and_folders_tell_which_downloads_failed() {
    let publisher = Publisher::new();
    let record = |key: &str, status: &str, caption: &str| {
        let failed = (status != "success").then_some("HTTP Error 404: Not Found");
        let record = json!({
            "caption": caption, "url": "http://h", "key": key, "status": status,
            "error_message": failed, "width": 256, "height": 256, "sha256": "0",
        });
        record.to_string().into_bytes()
    };
    let good = record("000000000", "success", "two lines\nin one caption");
    let failed = record("000000001", "failed_to_download", "gone");
    let no_text = record("000000002", "success", "only in its record");
    let members: [(&str, &[u8]); 6] = [
        ("000000000.jpg", &photo(0)),
        ("000000000.txt", b"two lines\nin one caption"),
        ("000000000.json", &good),
        ("000000001.json", &failed),
        ("000000002.webp", &photo(2)),
        ("000000002.json", &no_text),
    ];
    publisher
        .write("tars/00000.tar", tar(&members))
        .write("tars/00000_stats.json", b"{}");
    for (name, bytes) in members {
        publisher.write(&format!("files/00000/{name}"), bytes);
    }
    publisher.write("files/00000_stats.json", b"{}");
    let mut both = Vec::new();
    for layout in ["tars", "files"] {
        let catalog = img2dataset::catalog(&publisher.text(layout)).await;
        let read = publisher
            .pack_to(&format!("packed-{layout}"), catalog, 1)
            .await;
        assert_eq!(read.keys(), ["000000000", "000000002"], "{layout}");
        assert_eq!(read.of("000000000").texts(), ["two lines in one caption"]);
        assert_eq!(read.of("000000002").texts(), ["only in its record"]);
        read.tells(BadKind::FailedDownload, &["000000001.json", "404"]);
        both.push(read.samples);
    }
    assert_eq!(both[0], both[1], "the same samples");
}

async fn packed(publisher: &Publisher, name: &str, dataset: &str) -> Publisher {
    let lines = |images: [&str; 3]| {
        images.map(|image| {
            json!({"gold_label": "neutral", "sentence2": format!("{dataset} {image}"),
                "Flickr30K_ID": image})
        })
    };
    publisher.lines(
        &format!("{name}/snli_ve_train.jsonl"),
        &lines(["1", "2", "3"]),
    );
    for image in 1..4 {
        publisher.write(
            &format!("{name}/flickr30k-images/{image}.jpg"),
            photo(image),
        );
    }
    let output = Publisher::new();
    let catalog = snli_ve::catalog(&Input::new(publisher.path(name)));
    output.pack(catalog, 0).await;
    output
}

#[tokio::test]
async fn packed_datasets_are_mixed_and_repacked() {
    let publisher = Publisher::new();
    let one = packed(&publisher, "one", "first").await;
    let two = packed(&publisher, "two", "second").await;
    let inputs = [
        ("first".to_owned(), one.text("packed")),
        ("second".to_owned(), two.text("packed")),
    ];
    let mixed = publisher.pack(dataset::mixed(&inputs).await, 0).await;
    let manifest = &mixed.packed.manifest;
    assert_eq!(manifest.contents, Contents::SnliVe);
    let sources = manifest
        .sources
        .iter()
        .map(|s| (s.name.as_str(), s.samples, s.pairs));
    assert_eq!(
        sources.collect::<Vec<_>>(),
        [("first", 3, 3), ("second", 3, 3)]
    );
    assert_eq!(mixed.samples.len(), 6);
    let sample = mixed.of("second/2");
    assert_eq!((sample.texts(), sample.source), (vec!["second 2"], 1));
    assert_eq!(sample.bytes(), [photo(2)]);
    let both = manifest.shards[0]
        .source_samples
        .iter()
        .filter(|n| **n > 0)
        .count();
    assert_eq!(both, 2, "a shard holds samples of both");

    // Repacking keeps samples, sources and labels, whatever the shards.
    let repacked = webdataset::catalog(&publisher.text("packed"), Members::default()).await;
    let options = PackOptions {
        pairs_per_shard: 2,
        seed: 3,
        ..PackOptions::new(publisher.text("again"), "fixture")
    };
    let again = pack::pack(repacked.expect("is described"), &options)
        .await
        .expect("packs");
    assert_eq!(again.manifest.shards.len(), 3);
    let back = webdataset::catalog(&publisher.text("again"), Members::default()).await;
    let back = publisher.pack_to("back", back, 0).await;
    let plain = |samples: &std::collections::BTreeMap<String, Sample>| samples.clone();
    assert_eq!(plain(&back.samples), plain(&mixed.samples));
    assert_eq!(
        back.packed.manifest.shards, mixed.packed.manifest.shards,
        "the same bytes again"
    );
}

#[tokio::test]
async fn what_does_not_go_together_is_refused() {
    let publisher = Publisher::new();
    let one = packed(&publisher, "one", "first").await;
    let line = json!({"sentence": "s", "label": "True", "identifier": "dev-1-0-0"});
    publisher.lines("nlvr2/dev.json", &[line]);
    for image in 0..2 {
        publisher.write(&format!("nlvr2/dev/dev-1-0-img{image}.png"), png(image));
    }
    let other = nlvr2::catalog(&Input::new(publisher.path("nlvr2")).split("dev"));
    publisher.pack_to("two-images", other, 0).await;
    let mix = async |inputs: &[(&str, String)]| {
        let inputs: Vec<_> = inputs
            .iter()
            .map(|(n, p)| ((*n).to_owned(), p.clone()))
            .collect();
        let refused: Option<ShardError> = dataset::mixed(&inputs).await.err();
        refused.expect("is refused").to_string()
    };
    let one = one.text("packed");
    let told = mix(&[("a", one.clone()), ("b", publisher.text("two-images"))]).await;
    assert!(
        told.contains("Nlvr2") && told.contains("cannot be mixed"),
        "{told}"
    );
    let told = mix(&[("a", one.clone()), ("a", one.clone())]).await;
    assert!(
        told.contains("a name of its own") || told.contains("plain name"),
        "{told}"
    );
    assert!(mix(&[("a/b", one)]).await.contains("plain name"));
    let told = mix(&[("a", publisher.text("nowhere"))]).await;
    assert!(
        told.contains("nowhere") && told.contains("no such folder"),
        "{told}"
    );
}
