//! `belfry model`: how large the configured model is, as a table.

use std::path::PathBuf;

use belfry_configs::{Task, ValidConfig};
use belfry_model::ManagerTower;
use belfry_model::size::{Share, activation_bytes, modules, total, tower_macs, training_bytes};
use clap::Args;

/// Arguments of `belfry model`.
#[derive(Args)]
pub struct ModelArguments {
    /// The run file.
    config: PathBuf,
    /// Override a key, for instance --set model.image.size=384; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

/// Prints the table on standard output.
pub fn print(arguments: &ModelArguments) -> anyhow::Result<()> {
    let config = belfry_configs::load(&arguments.config, &arguments.settings)?;
    let model = ManagerTower::new(&config.model, config.data.text_len as usize)?;
    print!("{}", report(&config, model.table().elements() as u64));
    Ok(())
}

/// `trained` are the elements of the run's own model, heads included.
fn report(config: &ValidConfig, trained: u64) -> String {
    let modules = modules(&config.model, config.data.text_len as usize);
    let whole = total(&modules);
    let mut lines = vec![format!(
        "{:<20} {:>13} {:>10} {:>18}",
        "module", "parameters M", "FLOPs G", "activations MB/pair"
    )];
    let row = |name: &str, share: Share| {
        format!(
            "{name:<20} {:>13.2} {:>10.2} {:>19.1}",
            share.parameters as f64 / 1e6,
            share.macs as f64 / 1e9,
            activation_bytes(share) as f64 / 1e6
        )
    };
    lines.extend(modules.iter().map(|m| row(m.name, m.share)));
    lines.push(row("encoder", whole));
    let heads = Share {
        parameters: trained - whole.parameters,
        ..Share::default()
    };
    lines.push(format!(
        "{:<20} {:>13.2}   (not in Table 6)",
        "heads",
        heads.parameters as f64 / 1e6
    ));
    let (image, text) = (config.model.image.size, config.data.text_len);
    lines.push(String::new());
    lines.push(format!(
        "one pair, image {image}, text {text}; FLOPs as the paper counts them: multiply-accumulates \
         of one pass"
    ));
    lines.push(String::new());
    let pairs = u64::from(config.batch.micro_batch) * u64::from(config.batch.device_batch);
    let mut memory = worker_bytes(config, trained);
    let sum = memory.iter().map(|(_, bytes)| bytes).sum();
    memory.push(("peak of a step, about", sum));
    let title = format!("worker on the host, {pairs} pairs");
    lines.push(format!("{title:<32} {:>8}", "GB"));
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    lines.extend(
        memory
            .iter()
            .map(|(name, bytes)| format!("{name:<32} {:>8.2}", gigabytes(*bytes))),
    );
    lines.join("\n") + "\n"
}

/// Memory of a worker at the peak of a step, by what holds it; `trained` as in [`training_bytes`].
pub fn worker_bytes(config: &ValidConfig, trained: u64) -> Vec<(&'static str, u64)> {
    let pairs = u64::from(config.batch.micro_batch) * u64::from(config.batch.device_batch);
    let (model, text_len) = (&config.model, config.data.text_len as usize);
    training_bytes(model, text_len, (pairs, trained), config.batch.recompute)
}

/// Multiply-accumulates of a step over so many pairs: each pass with a backward of twice its
/// forward, and the vocabulary for `masked` words. What passes share is counted for both, as
/// frameworks compute it that know of no sharing; a classifier's head is not counted.
pub fn step_macs(config: &ValidConfig, pairs: u64, masked: u64) -> f64 {
    let model = &config.model;
    let modules = modules(model, config.data.text_len as usize);
    let whole = total(&modules).macs;
    // Pairs and hard negatives are fused; the towers see their texts and images once.
    let contrast = tower_macs(&modules) + 3 * (whole - tower_macs(&modules));
    let forward = match model.task {
        Task::Pretrain | Task::Nlvr2 => 2 * whole,
        Task::PretrainItc => whole + contrast,
        Task::Retrieval => contrast,
        Task::Vqa | Task::SnliVe => whole,
    };
    let hidden = u64::from(model.hidden);
    let words = match model.task {
        Task::Pretrain | Task::PretrainItc => {
            masked * hidden * (hidden + u64::from(model.text.vocab))
        }
        _ => 0,
    };
    3.0 * (pairs * forward + words) as f64
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(settings: &[&str]) -> ValidConfig {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/pretrain-4m.toml");
        let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
        belfry_configs::load(&file, &settings).expect("a run file of this repository")
    }

    #[test]
    fn a_run_file_prints_its_row_of_table_6() {
        for (settings, parameters, flops) in [
            (&["model.system=bridgetower"][..], "326.58", "101.25"),
            (&["model.manager=saue"], "326.77", "101.34"),
            (&["model.manager_query=visual"], "326.77", "101.35"),
            (&["model.manager_query=fused"], "338.64", "105.52"),
        ] {
            let config = config(&[&["model.image.size=384"], settings].concat());
            let model = ManagerTower::new(&config.model, 50).expect("its sizes fit");
            let text = report(&config, model.table().elements() as u64);
            let row = text
                .lines()
                .find(|line| line.starts_with("encoder"))
                .expect("a row");
            let words: Vec<&str> = row.split_whitespace().collect();
            assert_eq!(words[1..3], [parameters, flops], "{text}");
        }
    }

    /// Peaks of `belfry bench step` in GB, on two cores of one machine. Memory follows sizes, so they
    /// hold wherever the CPU backend runs; what a change of the model moves has to be measured anew.
    #[test]
    fn predicted_peaks_are_those_that_were_measured() {
        let blocks = "batch.recompute=blocks";
        for (settings, measured) in [
            (&[][..], 12.04),
            (&["batch.micro_batch=1"], 10.45),
            (&["batch.micro_batch=4"], 16.31),
            (&["batch.device_batch=2"], 16.33),
            (&["model.cross_layers=2"], 9.21),
            (&["model.cross_layers=8"], 15.01),
            (&[blocks], 9.86),
            (&[blocks, "batch.micro_batch=4"], 9.86),
            (&[blocks, "model.cross_layers=8"], 10.71),
        ] {
            let small = [
                "batch.lanes=1",
                "batch.global_batch=8",
                "cluster.min_workers=1",
            ];
            let own = ["batch.micro_batch=2", "batch.device_batch=1"];
            let config = config(&[&small[..], &own, settings].concat());
            let (model, text_len) = (&config.model, config.data.text_len as usize);
            let tower = ManagerTower::new(model, text_len).expect("its sizes fit");
            let pairs = u64::from(config.batch.micro_batch * config.batch.device_batch);
            let sizes = (pairs, tower.table().elements() as u64);
            let bytes = training_bytes(model, text_len, sizes, config.batch.recompute);
            let peak = bytes
                .iter()
                .map(|(_, bytes)| *bytes as f64 / 1e9)
                .sum::<f64>();
            let ratio = peak / measured;
            println!("{settings:?}: {peak:.2} GB predicted, {measured:.2} measured, {ratio:.3}");
            assert!((ratio - 1.0).abs() < 0.1, "{settings:?}: {bytes:?}");
        }
    }
}
