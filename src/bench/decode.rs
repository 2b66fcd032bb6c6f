//! `belfry bench decode`: from the bytes of shards to batches on one core, beside a Python process
//! that does the same with webdataset, Pillow and numpy.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, anyhow, ensure};
use belfry_configs::rng::{Key, Purpose};
use belfry_configs::{Transform, ValidConfig};
use belfry_data::Text;
use clap::Args;
use shard_tools::reader;

use super::Case;
use super::table::{Report, seconds};
use super::timing::Rounds;

const PEER: &str = include_str!("decode_peer.py");
/// Pairs of a batch, on both sides.
const BATCH: usize = 32;

/// Arguments of `belfry bench decode`.
#[derive(Args)]
pub struct DecodeArguments {
    #[command(flatten)]
    case: Case,
    /// Passes over the shards on each side, in turn.
    #[arg(long, value_name = "N", default_value_t = 7)]
    rounds: usize,
    /// Make N JPEGs of COCO's sizes (640x480, quality 90) out of data.pack_from instead of reading
    /// the shards of data.train.
    #[arg(long, value_name = "N")]
    photos: Option<u32>,
    /// A Python with webdataset, pillow, numpy and tokenizers.
    #[arg(long, env = "BELFRY_PYTHON", default_value = "python3")]
    python: String,
}

/// Measures and prints.
pub fn run(arguments: &DecodeArguments) -> anyhow::Result<()> {
    ensure!(arguments.rounds > 0, "--rounds: must be at least 1");
    let config = arguments.case.load(&[])?;
    let temporary = tempfile::tempdir()?;
    let shards = match arguments.photos {
        Some(count) => photos(arguments, &config, count, temporary.path())?,
        None => PathBuf::from(
            config
                .data
                .train
                .only()
                .context("data.train names several")?,
        ),
    };
    let ours = Ours::open(&config, &shards)?;
    let mut peer = Peer::start(&arguments.python, &config, &shards)?;
    let mut times = Times::default();
    let warm_up = ours.pass(0)?;
    for round in 0..arguments.rounds {
        let begun = Instant::now();
        let pass = ours.pass(round as u64)?;
        times.ours.add(begun.elapsed().as_secs_f64());
        times.images.add(pass.images_time);
        times.text.add(pass.text_time);
        let (theirs, time) = peer.pass()?;
        ensure!(
            theirs == pass.images,
            "Python decoded {theirs} images, this process {}",
            pass.images
        );
        times.python.add(time);
    }
    print(arguments, &config, &warm_up, &times);
    Ok(())
}

/// Packs pictures of photograph size, made from the run file's small ones.
fn photos(
    arguments: &DecodeArguments,
    config: &ValidConfig,
    count: u32,
    folder: &Path,
) -> anyhow::Result<PathBuf> {
    let from = config.data.pack_from.as_ref();
    let from = from.context("--photos makes them from data.pack_from, which is not set")?;
    let (images, packed) = (folder.join("images"), folder.join("packed"));
    std::fs::create_dir(&images)?;
    let made = Command::new(&arguments.python)
        .args(["-c", PEER, "photos", from])
        .arg(&images)
        .arg(count.to_string())
        .status();
    let made = made.with_context(|| format!("{}: does not start", arguments.python))?;
    ensure!(made.success(), "{}: made no photographs", arguments.python);
    let shards = Command::new(std::env::current_exe()?)
        .args(["shards", "pack"])
        .args([&images, &packed])
        .output()?;
    ensure!(
        shards.status.success(),
        "packing the photographs: {}",
        String::from_utf8_lossy(&shards.stderr)
    );
    Ok(packed)
}

/// The tars of a folder, sorted.
fn tars(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("{}: must be a local folder of shards", folder.display()))?;
    let mut tars = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "tar") {
            tars.push(path);
        }
    }
    tars.sort();
    ensure!(!tars.is_empty(), "{}: holds no tar", folder.display());
    Ok(tars)
}

/// What a worker's data plane does with a sample, on one thread.
struct Ours {
    tars: Vec<PathBuf>,
    text: Text,
    config: ValidConfig,
}

/// What came of a pass.
#[derive(Default)]
struct Pass {
    images: usize,
    /// Of the image files.
    bytes: usize,
    /// Seconds inside decode and transform.
    images_time: f64,
    /// Seconds inside the tokenizer.
    text_time: f64,
}

impl Ours {
    fn open(config: &ValidConfig, shards: &Path) -> anyhow::Result<Self> {
        let (data, vocab) = (&config.data, config.model.text.vocab);
        Ok(Ours {
            tars: tars(shards)?,
            text: Text::open(&data.tokenizer, data.text_len as usize, vocab)?,
            config: config.clone(),
        })
    }

    fn pass(&self, round: u64) -> anyhow::Result<Pass> {
        let data = &self.config.data;
        let side = self.config.model.image.size as usize;
        let key = Key::new(round, Purpose::Pack);
        let mut pass = Pass::default();
        let (mut images, mut ids) = (Vec::new(), Vec::new());
        for tar in &self.tars {
            let name = tar.display().to_string();
            let shard = std::fs::read(tar)?;
            for sample in reader::scan(&shard, &name)? {
                let member = &sample.images[0];
                let bytes = reader::member_bytes(&shard, &name, member)?;
                let key = key.with(pass.images as u64);
                if images.is_empty() {
                    images.reserve_exact(BATCH * 3 * side * side);
                    ids.reserve_exact(BATCH * data.text_len as usize);
                }
                let begun = Instant::now();
                belfry_data::transform(
                    bytes,
                    data.train_transform,
                    side,
                    data.truncated_jpeg,
                    key,
                    &mut images,
                )
                .map_err(|reason| anyhow!("{name}, member {}: {reason}", member.name))?;
                pass.images_time += begun.elapsed().as_secs_f64();
                let begun = Instant::now();
                let text = reader::member_bytes(&shard, &name, &sample.text)?;
                let text = std::str::from_utf8(text)?;
                ids.extend(self.text.ids(text.lines().next().unwrap_or(""))?);
                pass.text_time += begun.elapsed().as_secs_f64();
                pass.images += 1;
                pass.bytes += bytes.len();
                if pass.images % BATCH == 0 {
                    std::hint::black_box((std::mem::take(&mut images), std::mem::take(&mut ids)));
                }
            }
        }
        std::hint::black_box((images, ids));
        Ok(pass)
    }
}

/// The Python process; ended when its standard input is.
struct Peer {
    child: Child,
    ask: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    fn start(python: &str, config: &ValidConfig, shards: &Path) -> anyhow::Result<Self> {
        let data = &config.data;
        let kind = serde_json::to_value(data.train_transform)?;
        let mut child = Command::new(python)
            .args(["-c", PEER, "read"])
            .arg(shards)
            .arg(kind.as_str().context("a transform has a name")?)
            .arg(config.model.image.size.to_string())
            .arg(&data.tokenizer)
            .args([data.text_len.to_string(), BATCH.to_string()])
            // One core, as the other side has.
            .envs([("OMP_NUM_THREADS", "1"), ("OPENBLAS_NUM_THREADS", "1")])
            .envs([
                ("RAYON_NUM_THREADS", "1"),
                ("TOKENIZERS_PARALLELISM", "false"),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{python}: does not start; --python names another"))?;
        let answers = BufReader::new(child.stdout.take().context("its output is piped")?);
        let mut peer = Peer {
            ask: child.stdin.take(),
            child,
            answers,
        };
        ensure!(
            peer.line()? == "ready",
            "{python}: needs `pip install webdataset pillow numpy tokenizers`; --python names \
             another"
        );
        Ok(peer)
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    /// Images and seconds of one pass.
    fn pass(&mut self) -> anyhow::Result<(usize, f64)> {
        writeln!(self.ask.as_mut().context("it runs")?)?;
        let line = self.line()?;
        let (images, time) = line.split_once(' ').context("Python ended early")?;
        Ok((images.parse()?, time.parse()?))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.ask.take());
        let _ = self.child.wait();
    }
}

/// Seconds of passes.
#[derive(Default)]
struct Times {
    ours: Rounds,
    /// Of ours, decode and transform.
    images: Rounds,
    /// Of ours, the tokenizer.
    text: Rounds,
    python: Rounds,
}

fn print(arguments: &DecodeArguments, config: &ValidConfig, pass: &Pass, times: &Times) {
    let images = pass.images as f64;
    let kind = config.data.train_transform;
    let mut report = Report::new(
        "decode",
        format!(
            "bench decode: {} images of {:.0} kB in the mean, {kind:?} at {} pixels, {} tokens, \
             batches of {BATCH}, one core",
            pass.images,
            pass.bytes as f64 / images / 1e3,
            config.model.image.size,
            config.data.text_len
        ),
    );
    report.note(format!(
        "medians of {} passes on each side in turn; Python is webdataset, Pillow, numpy and \
         tokenizers in one process",
        arguments.rounds
    ));
    if matches!(
        kind,
        Transform::AlbefRandaugWc | Transform::AlbefRandaugWohf
    ) {
        report.note("Python crops and flips, but leaves RandomAugment out");
    }
    let rates = [&times.ours, &times.python].map(|times| images / times.median());
    let ratio = rates[0] / rates[1];
    let floor = format!("{:.1} /s, Python", rates[1]);
    report.row("images", format!("{:.1} /s", rates[0]), floor, ratio);
    let each = |times: &Rounds| seconds(times.median() / images);
    report.row("an image", each(&times.ours), each(&times.python), None);
    report.row("of it decode, transform", each(&times.images), "", None);
    report.row("of it tokenise", each(&times.text), "", None);
    report.json("images", pass.images as u64);
    report.json("image_bytes", pass.bytes as u64);
    report.json("images_per_second_per_core", rates[0]);
    report.json("python_images_per_second_per_core", rates[1]);
    report.json("ratio", ratio);
    report.print();
}
