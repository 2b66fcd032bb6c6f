//! `belfry bench eval`: a whole retrieval evaluation on made-up images and captions, beside the same
//! fusion passes with everything already on the device.
//!
//! Weights are random: what is ranked means nothing, what it costs does.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::ensure;
use belfry_configs::ValidConfig;
use belfry_model::{ManagerTower, Weights};
use belfry_worker::evaluate::{EncoderRuns, Evaluator, Finding};
use belfry_worker::open_device;
use clap::Args;
use shard_tools::pack::{self, PackOptions};

use super::Case;
use super::table::{Report, gigabytes, seconds};
use super::timing::{peak_bytes, reset_peak};

/// Pairs of one made-up shard.
const PAIRS_PER_SHARD: u32 = 1000;
/// Side of a made-up image.
const SIDE: u32 = 40;
/// Fusion passes of the floor.
const FLOOR_PASSES: usize = 50;

/// Arguments of `belfry bench eval`.
#[derive(Args)]
pub struct EvalArguments {
    #[command(flatten)]
    case: Case,
    /// Images.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    images: u32,
    /// Captions of each.
    #[arg(long, value_name = "N", default_value_t = 5)]
    captions: u32,
}

/// Measures and prints.
pub async fn run(arguments: EvalArguments) -> anyhow::Result<()> {
    ensure!(
        arguments.images > 0 && arguments.captions > 0,
        "--images, --captions: must be at least 1"
    );
    let folder = tempfile::tempdir()?;
    let (photos, packed) = (folder.path().join("photos"), folder.path().join("packed"));
    write(&photos, arguments.images, arguments.captions)?;
    let packed = packed.display().to_string();
    let options = PackOptions {
        pairs_per_shard: PAIRS_PER_SHARD,
        ..PackOptions::new(&packed, "made-up")
    };
    pack::pack(pack::folder(&photos, None)?, &options).await?;
    let config = arguments.case.load(&[
        "model.task=retrieval".into(),
        format!("data.train={packed:?}"),
        format!("data.validation={packed:?}"),
    ])?;
    let cache = folder.path().join("cache");
    let measured = tokio::task::spawn_blocking(move || measure(&config, &cache)).await??;
    print(&arguments, &measured);
    Ok(())
}

struct Measured {
    encoding: f64,
    fusing: f64,
    /// Of one batch with everything on the device.
    floor_batch: f64,
    passes: u64,
    batches: u64,
    runs: EncoderRuns,
    peak: u64,
}

fn measure(config: &ValidConfig, cache: &Path) -> anyhow::Result<Measured> {
    let device = open_device(&config.run.device)?.without_autodiff();
    let model = ManagerTower::new(&config.model, config.data.text_len as usize)?;
    let model = Arc::new(model);
    let parameters = model.table().init(config.run.seed);
    let weights = Weights::load(model.table(), &parameters, &device)?;
    let weights = weights.multiplied_in(config.precision.matmul);
    reset_peak();
    let begun = Instant::now();
    let mut evaluator = Evaluator::open(config, cache, Arc::clone(&model), &weights)?;
    evaluator.encode("bench", None)?;
    let encoding = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    let size = u64::from(config.eval.pairs_per_batch);
    let (mut findings, mut passes, mut batches) = (Vec::new(), 0, 0);
    for unit in 0..evaluator.work().units {
        let finding = evaluator.find(unit)?;
        if let Finding::Query { scored } = &finding {
            passes += scored.len() as u64;
            batches += (scored.len() as u64).div_ceil(size);
        }
        findings.push(finding);
    }
    evaluator.work().conclude(&findings)?;
    Ok(Measured {
        encoding,
        fusing: begun.elapsed().as_secs_f64(),
        floor_batch: floor(config, &model, &weights)?,
        passes,
        batches,
        runs: evaluator.encoder_runs(),
        peak: peak_bytes().unwrap_or(0),
    })
}

/// Seconds of one batch's fusion pass whose experts never leave the device.
fn floor(config: &ValidConfig, model: &ManagerTower, weights: &Weights) -> anyhow::Result<f64> {
    let size = config.eval.pairs_per_batch as usize;
    let tokens = size * config.data.text_len as usize;
    let texts = model.encode_texts(weights, &vec![5; tokens], &vec![1.0; tokens])?;
    let side = config.model.image.size as usize;
    let images = model.encode_images(weights, &vec![0.5; 3 * side * side])?;
    let pairs: Vec<(usize, usize)> = (0..size).map(|text| (text, 0)).collect();
    model.match_logits(weights, &texts, &images, &pairs)?;
    let begun = Instant::now();
    for _ in 0..FLOOR_PASSES {
        model.match_logits(weights, &texts, &images, &pairs)?;
    }
    Ok(begun.elapsed().as_secs_f64() / FLOOR_PASSES as f64)
}

fn print(arguments: &EvalArguments, measured: &Measured) {
    let (images, texts) = (arguments.images, arguments.images * arguments.captions);
    let title = format!("retrieval evaluation of {images} images and {texts} texts");
    let mut report = Report::new("eval", title);
    let EncoderRuns {
        images: image_runs,
        texts: text_runs,
    } = measured.runs;
    report.row(
        "encoder runs",
        format!("{}", image_runs + text_runs),
        format!("{}, each image and text once", images + texts),
        (image_runs + text_runs) as f64 / f64::from(images + texts),
    );
    report.row("reading, encoding", seconds(measured.encoding), "", None);
    let floor = measured.floor_batch * measured.batches as f64;
    report.row(
        &format!("{} fusion passes", measured.passes),
        seconds(measured.fusing),
        format!("{}, experts on the device", seconds(floor)),
        measured.fusing / floor,
    );
    report.row("peak memory", gigabytes(measured.peak as f64), "", None);
    for (key, value) in [
        ("encoder_runs", (image_runs + text_runs) as f64),
        ("fusion_passes", measured.passes as f64),
        ("encode_seconds", measured.encoding),
        ("fuse_seconds", measured.fusing),
        ("floor_seconds", floor),
        ("peak_bytes", measured.peak as f64),
    ] {
        report.json(key, value);
    }
    report.print();
}

/// Images of one colour each with numbered captions.
fn write(folder: &Path, images: u32, captions: u32) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    for image in 0..images {
        let name = format!("{image:06}");
        std::fs::write(folder.join(format!("{name}.bmp")), bitmap(image))?;
        let caption = |n| format!("a picture of number {image} in words {n}\n");
        let text: String = (0..captions).map(caption).collect();
        std::fs::write(folder.join(format!("{name}.txt")), text)?;
    }
    Ok(())
}

/// A BMP of 24 bits with a colour of its own.
fn bitmap(number: u32) -> Vec<u8> {
    let pixels = 3 * SIDE * SIDE;
    let (file_header, info_header) = (14u32, 40u32);
    let mut bytes = b"BM".to_vec();
    let words = [
        file_header + info_header + pixels,
        0,
        file_header + info_header,
    ];
    bytes.extend(words.iter().flat_map(|w| w.to_le_bytes()));
    bytes.extend(
        [info_header, SIDE, SIDE]
            .iter()
            .flat_map(|w| w.to_le_bytes()),
    );
    bytes.extend([1u16, 24].iter().flat_map(|w| w.to_le_bytes()));
    bytes.extend([0u32; 6].iter().flat_map(|w| w.to_le_bytes()));
    let [b, g, r, _] = number.wrapping_mul(0x9E37_79B1).to_le_bytes();
    bytes.extend((0..SIDE * SIDE).flat_map(|_| [b, g, r]));
    bytes
}
