//! `belfry bench step --fit`: the device batch that is fastest and fits.
//!
//! Every case runs in a process of its own: what runs out of memory takes nothing else along, and
//! a peak belongs to one case. Nothing is chosen at run time: the choice goes into the run file.

use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use super::ladder::{Figures, Outcome, Rung, divisors, fastest, go_on};
use super::run_file;
use super::step::{StepArguments, on_host};
use super::table::{gigabytes, seconds};
use super::timing::available_bytes;
use super::worker::predicted_bytes;

/// What a process says that has not enough memory, in lower case.
const TOO_LARGE: [&str; 6] = [
    "out of memory",
    "out of device memory",
    "can't allocate buffer",
    "out_of_memory",
    "outofmemory",
    "memory allocation of",
];
/// The signal by which the system ends a process that takes too much.
const SIGKILL: i32 = 9;

/// Tries, prints the table, names the fastest.
pub fn run(arguments: &StepArguments) -> anyhow::Result<()> {
    if arguments.write {
        ensure!(
            arguments.case.settings.is_empty() && arguments.pairs.is_none(),
            "--write: what is written must have been measured on the run file as it stands; leave \
             out --set and --pairs"
        );
    }
    let mut settings = arguments.pairs_settings();
    // Any case of the ladder is valid or none.
    settings.push("batch.device_batch=1".into());
    let config = arguments.case.load(&settings)?;
    let on_host = on_host(&config);
    let free = if on_host { available_bytes() } else { None };
    let limit = arguments.memory_bytes.or(free);
    println!(
        "bench step --fit: {} on {}, micro-batches of {} pairs, {} per lane",
        arguments.case.config.display(),
        config.run.device,
        config.batch.micro_batch,
        config.micro_batches_per_lane()
    );
    match limit {
        Some(limit) => println!(
            "skipped: what is predicted to need more than {}",
            gigabytes(limit as f64)
        ),
        None => println!("memory unknown: every case is tried"),
    }
    println!("{HEAD}");
    let mut rungs: Vec<Rung> = Vec::new();
    for device_batch in divisors(config.micro_batches_per_lane()) {
        if !go_on(&rungs) {
            break;
        }
        let mut case = settings.clone();
        case.push(format!("batch.device_batch={device_batch}"));
        let predicted = predicted_bytes(&arguments.case.load(&case)?)?;
        let outcome = match limit {
            Some(limit) if predicted > limit => Outcome::Skipped { predicted },
            _ => attempt(arguments, &case)?,
        };
        let rung = Rung {
            device_batch,
            outcome,
        };
        println!("{}", line(&rung));
        rungs.push(rung);
    }
    finish(arguments, &rungs)
}

const HEAD: &str = "device_batch     s/step  samples/s    MFU        peak   predicted   ratio";

fn line(rung: &Rung) -> String {
    let figures = match &rung.outcome {
        Outcome::Ran(figures) => figures,
        Outcome::Skipped { predicted } => {
            let predicted = gigabytes(*predicted as f64);
            return format!(
                "{:>12}   skipped: predicted to need {predicted}",
                rung.device_batch
            );
        }
        Outcome::TooLarge(reason) => {
            return format!("{:>12}   does not fit: {reason}", rung.device_batch);
        }
    };
    let peak = figures.peak_bytes.map(|bytes| bytes as f64);
    let predicted = figures.predicted_bytes as f64;
    let ratio = peak.map_or("-".into(), |peak| format!("{:.2}", peak / predicted));
    format!(
        "{:>12} {:>10} {:>10.3} {:>6.2} {:>11} {:>11} {ratio:>7}",
        rung.device_batch,
        seconds(figures.seconds),
        figures.samples_per_second,
        figures.mfu,
        peak.map_or("unknown".into(), gigabytes),
        gigabytes(predicted),
    )
}

/// One case in a process of its own.
fn attempt(arguments: &StepArguments, settings: &[String]) -> anyhow::Result<Outcome> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(program);
    command.args(["bench", "step"]).arg(&arguments.case.config);
    command.args(["--steps", &arguments.steps.to_string()]);
    command.args(["--warm-up", &arguments.warm_up.to_string()]);
    if arguments.pairs.is_none() {
        command.args(["--lanes", &arguments.lanes.to_string()]);
    }
    for setting in arguments.case.all(settings) {
        command.args(["--set", &setting]);
    }
    let output = command
        .stdin(Stdio::null())
        .output()
        .context("cannot start a case as a process")?;
    judge(&output)
}

fn judge(output: &Output) -> anyhow::Result<Outcome> {
    use std::os::unix::process::ExitStatusExt as _;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        let text = String::from_utf8_lossy(&output.stdout);
        let last = text.lines().last().unwrap_or_default();
        return Ok(Outcome::Ran(figures(last)?));
    }
    if output.status.signal() == Some(SIGKILL) {
        return Ok(Outcome::TooLarge("killed by the system".into()));
    }
    let telling = said.lines().find(|line| {
        let line = line.to_lowercase();
        TOO_LARGE.iter().any(|words| line.contains(words))
    });
    match telling {
        Some(line) => Ok(Outcome::TooLarge(line.trim().to_owned())),
        None => bail!(
            "a case ended with {}: {}",
            output.status,
            said.trim().trim_start_matches("error: ")
        ),
    }
}

/// From the JSON line of `belfry bench step`.
fn figures(line: &str) -> anyhow::Result<Figures> {
    let parsed: Value =
        serde_json::from_str(line).with_context(|| format!("a case ended with `{line}`"))?;
    let number = |key: &str| {
        let value = parsed[key].as_f64();
        value.with_context(|| format!("a case said no `{key}`"))
    };
    let device = parsed["device_peak_bytes"].as_u64();
    let host = parsed["host_peak_bytes"].as_u64();
    let on_host = parsed["device_peak_bytes"].is_null();
    Ok(Figures {
        seconds: number("seconds")?,
        samples_per_second: number("samples_per_second")?,
        mfu: number("mfu")?,
        peak_bytes: if on_host { host } else { device },
        predicted_bytes: number("predicted_bytes")? as u64,
    })
}

fn finish(arguments: &StepArguments, rungs: &[Rung]) -> anyhow::Result<()> {
    let file = &arguments.case.config;
    let Some(best) = fastest(rungs) else {
        bail!(
            "no device_batch fits, not even 1: a smaller batch.micro_batch or a larger device is \
             needed"
        );
    };
    if arguments.write {
        let before = run_file::set_device_batch(file, best)?;
        let before = before.map_or("none".into(), |n| n.to_string());
        println!(
            "{}: batch.device_batch = {best} (before: {before})",
            file.display()
        );
    } else {
        println!("fastest that fits; into {}, under [batch]:", file.display());
        println!("device_batch = {best}");
    }
    let cases: Vec<Value> = rungs.iter().map(as_json).collect();
    let written = arguments.write;
    println!(
        "{}",
        json!({"bench": "fit", "device_batch": best, "written": written, "cases": cases})
    );
    Ok(())
}

fn as_json(rung: &Rung) -> Value {
    let device_batch = rung.device_batch;
    match &rung.outcome {
        Outcome::Ran(f) => json!({
            "device_batch": device_batch, "seconds": f.seconds, "mfu": f.mfu,
            "samples_per_second": f.samples_per_second,
            "peak_bytes": f.peak_bytes, "predicted_bytes": f.predicted_bytes,
        }),
        Outcome::Skipped { predicted } => {
            json!({"device_batch": device_batch, "skipped": true, "predicted_bytes": predicted})
        }
        Outcome::TooLarge(reason) => json!({"device_batch": device_batch, "too_large": reason}),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use super::*;

    fn ended(status: i32, out: &str, err: &str) -> Output {
        Output {
            status: ExitStatus::from_raw(status),
            stdout: out.into(),
            stderr: err.into(),
        }
    }

    #[test]
    fn a_case_without_memory_does_not_fit_and_any_other_end_is_an_error() {
        let killed = judge(&ended(SIGKILL, "", "")).expect("an outcome");
        assert_eq!(killed, Outcome::TooLarge("killed by the system".into()));
        let said = "x\nerror: CUDA_ERROR_OUT_OF_MEMORY while reserving\n";
        let cuda = judge(&ended(2 << 8, "", said)).expect("an outcome");
        let words = "error: CUDA_ERROR_OUT_OF_MEMORY while reserving";
        assert_eq!(cuda, Outcome::TooLarge(words.into()));
        let other = judge(&ended(2 << 8, "", "error: no such file")).expect_err("an error");
        assert!(other.to_string().contains("no such file"), "{other}");
    }

    #[test]
    fn figures_come_from_the_last_line() {
        let line = r#"{"device":"cuda:0","seconds":0.5,"samples_per_second":16.0,"mfu":0.4,
            "host_peak_bytes":7,"device_peak_bytes":9,"predicted_bytes":8}"#;
        let line = line.replace('\n', "");
        let ran = judge(&ended(0, &format!("a table\n{line}\n"), "")).expect("an outcome");
        let Outcome::Ran(figures) = ran else {
            panic!("it ran")
        };
        assert_eq!((figures.peak_bytes, figures.predicted_bytes), (Some(9), 8));
        assert!(judge(&ended(0, "no JSON\n", "")).is_err());
    }
}
