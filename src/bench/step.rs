//! `belfry bench step`: time, arithmetic and memory of a worker's step.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{bail, ensure};
use belfry_configs::ValidConfig;
use belfry_model::floor::{MatrixProducts, Memory, reserved_bytes};
use clap::Args;

use super::table::{Report, gigabytes, seconds};
use super::timing::{Rounds, peak_bytes, reset_peak};
use super::worker::{Rehearsal, predicted_bytes};
use super::{Case, fit, trace};

/// Arguments of `belfry bench step`.
#[derive(Args, Clone)]
pub struct StepArguments {
    #[command(flatten)]
    pub(super) case: Case,
    /// Steps that are timed.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(super) steps: u32,
    /// Steps before them, which pay for fresh memory and for what the device compiles.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) warm_up: u32,
    /// Lanes that the worker computes in a step.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) lanes: u32,
    /// A step of N pairs in one lane: short for --set batch.lanes=1 --set batch.global_batch=N.
    #[arg(long, value_name = "N", conflicts_with = "lanes")]
    pub(super) pairs: Option<u32>,
    /// TFLOP/s of the chip's data sheet, for a second MFU.
    #[arg(long, value_name = "X")]
    peak_tflops: Option<f64>,
    /// Try every device_batch that divides a lane's micro-batches, ascending, each in a process of
    /// its own, and name the fastest that fits.
    #[arg(long, conflicts_with = "trace")]
    fit: bool,
    /// With --fit: put the fastest into the run file; its comments stay.
    #[arg(long, requires = "fit")]
    pub(super) write: bool,
    /// With --fit: skip what `belfry model` predicts to need more. Default: on the host what is
    /// free; on a device everything is tried.
    #[arg(long, value_name = "BYTES", requires = "fit")]
    pub(super) memory_bytes: Option<u64>,
    /// Show where a step's time goes, by phase. Waits for the device at the ends of every phase, so
    /// the step is slower than one that nobody looks at.
    #[arg(long)]
    trace: bool,
    /// With --trace: where the timeline goes, for https://ui.perfetto.dev.
    #[arg(
        long,
        value_name = "FILE",
        default_value = "trace.json",
        requires = "trace"
    )]
    pub(super) out: PathBuf,
}

impl StepArguments {
    /// The settings that `--pairs` is short for.
    pub(super) fn pairs_settings(&self) -> Vec<String> {
        let Some(pairs) = self.pairs else {
            return Vec::new();
        };
        vec![
            "batch.lanes=1".into(),
            format!("batch.global_batch={pairs}"),
        ]
    }
}

/// Measures, fits or traces.
pub fn run(arguments: &StepArguments) -> anyhow::Result<()> {
    ensure!(arguments.steps > 0, "--steps: must be at least 1");
    if arguments.peak_tflops.is_some_and(|peak| peak <= 0.0) {
        bail!("--peak-tflops: must be above zero");
    }
    if arguments.fit {
        return fit::run(arguments);
    }
    let config = arguments.case.load(&arguments.pairs_settings())?;
    if arguments.trace {
        return trace::run(arguments, &config);
    }
    measure(arguments, &config)?.print(arguments, &config)
}

/// The line that says which step it is.
pub(super) fn title(what: &str, arguments: &StepArguments, config: &ValidConfig) -> String {
    let batch = &config.batch;
    let per_lane = config.micro_batches_per_lane();
    format!(
        "{what}: {} on {}, {} pairs a step: {} x {} device batches of {} micro-batches of {} pairs",
        arguments.case.config.display(),
        config.run.device,
        arguments.lanes * per_lane * batch.micro_batch,
        arguments.lanes,
        per_lane / batch.device_batch,
        batch.device_batch,
        batch.micro_batch,
    )
}

/// Whether the device's memory is the host's.
pub(super) fn on_host(config: &ValidConfig) -> bool {
    !config.run.device.starts_with("cuda")
}

/// What was measured.
struct Measured {
    times: Rounds,
    /// Multiply-accumulates per second of large products.
    products: Rounds,
    /// Bytes per second of a large addition.
    memory: Rounds,
    side: usize,
    /// Multiply-accumulates and pairs of a step.
    work: f64,
    pairs: usize,
    host_peak: Option<u64>,
    device_peak: Option<u64>,
    sha256: String,
}

fn measure(arguments: &StepArguments, config: &ValidConfig) -> anyhow::Result<Measured> {
    let mut worker = Rehearsal::new(config, arguments.lanes)?;
    reset_peak();
    for _ in 0..arguments.warm_up {
        worker.step()?;
    }
    let mut times = Rounds::default();
    let mut time = |worker: &mut Rehearsal| -> anyhow::Result<()> {
        let begun = Instant::now();
        worker.step()?;
        times.add(begun.elapsed().as_secs_f64());
        Ok(())
    };
    time(&mut worker)?;
    // Before the floors take their own.
    let (host_peak, device_peak) = (peak_bytes(), reserved_bytes(&worker.device));
    let floor = MatrixProducts::new(&worker.device, config.precision.matmul)?;
    let bandwidth = Memory::new(&worker.device);
    let (mut products, mut memory) = (Rounds::default(), Rounds::default());
    // Unmeasured: the device compiles.
    floor.rate()?;
    bandwidth.rate()?;
    for step in 0..arguments.steps {
        products.add(floor.rate()?);
        memory.add(bandwidth.rate()?);
        if step > 0 {
            time(&mut worker)?;
        }
    }
    Ok(Measured {
        times,
        products,
        memory,
        side: floor.side(),
        work: worker.products(),
        pairs: worker.pairs(),
        host_peak,
        device_peak,
        sha256: worker.parameters_sha256()?,
    })
}

impl Measured {
    fn print(&self, arguments: &StepArguments, config: &ValidConfig) -> anyhow::Result<()> {
        let mut report = Report::new("step", title("bench step", arguments, config));
        report.note(format!(
            "{} steps, medians (range); before them {} unmeasured; one look at each floor per step",
            arguments.steps, arguments.warm_up
        ));
        self.speed(&mut report, arguments, config);
        self.memory(&mut report, config)?;
        report.json("device", config.run.device.as_str());
        report.json("matmul", config.precision.matmul.name());
        report.json("device_batch", config.batch.device_batch);
        report.json("micro_batch", config.batch.micro_batch);
        report.json("pairs", self.pairs as u64);
        report.json("parameters_sha256", self.sha256.as_str());
        report.print();
        Ok(())
    }

    fn speed(&self, report: &mut Report, arguments: &StepArguments, config: &ValidConfig) {
        let (time, (low, high)) = (self.times.median(), self.times.range());
        let rate = self.products.median();
        let alone = self.work / rate;
        let spread = format!("{} ({} - {})", seconds(time), seconds(low), seconds(high));
        let floor = format!("{}, its matrix products alone", seconds(alone));
        report.row("time of a step", spread, floor, time / alone);
        let samples = self.pairs as f64 / time;
        report.row("samples", format!("{samples:.3} /s"), "", None);
        let tflops = |macs: f64| 2.0 * macs / 1e12;
        let reached = tflops(self.work) / time;
        let kind = config.precision.matmul.name();
        let floor = format!(
            "{:.3} TFLOP/s, {kind} products of {} rows",
            tflops(rate),
            self.side
        );
        let mfu = reached / tflops(rate);
        report.row(
            "arithmetic (MFU)",
            format!("{reached:.3} TFLOP/s"),
            floor,
            mfu,
        );
        report.json("seconds", time);
        report.json("seconds_min", low);
        report.json("seconds_max", high);
        report.json("samples_per_second", samples);
        report.json("tflops", reached);
        report.json("matmul_tflops", tflops(rate));
        report.json("mfu", mfu);
        if let Some(sheet) = arguments.peak_tflops {
            let floor = format!("{sheet} TFLOP/s, the chip's sheet");
            let share = reached / sheet;
            report.row(
                "arithmetic (MFU)",
                format!("{reached:.3} TFLOP/s"),
                floor,
                share,
            );
            report.json("mfu_sheet", share);
        }
        let bandwidth = self.memory.median();
        let floor = format!("{}/s, a large addition", gigabytes(bandwidth));
        report.row("memory bandwidth", "-".into(), floor, None);
        report.json("memory_bytes_per_second", bandwidth);
    }

    fn memory(&self, report: &mut Report, config: &ValidConfig) -> anyhow::Result<()> {
        let predicted = predicted_bytes(config)?;
        let on_host = on_host(config);
        let beside = |wanted: bool, peak: Option<u64>| {
            let peak = peak.filter(|_| wanted);
            peak.map(|peak| peak as f64 / predicted as f64)
        };
        let words = |peak: Option<u64>| peak.map_or("unknown".into(), |b| gigabytes(b as f64));
        let floor = |wanted: bool| match wanted {
            true => format!("{}, as belfry model counts", gigabytes(predicted as f64)),
            false => String::new(),
        };
        report.row(
            "peak memory, host",
            words(self.host_peak),
            floor(on_host),
            beside(on_host, self.host_peak),
        );
        report.json("host_peak_bytes", self.host_peak);
        report.json("predicted_bytes", predicted);
        if !on_host {
            report.row(
                "peak memory, device",
                words(self.device_peak),
                floor(true),
                beside(true, self.device_peak),
            );
            report.json("device_peak_bytes", self.device_peak);
        }
        Ok(())
    }
}
