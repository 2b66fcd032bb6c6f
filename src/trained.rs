//! A trained model as a command is given it: a run's checkpoint, or a file of weights with its run
//! file. What evaluates and what answers begins here.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use belfry_configs::{CPU_APART, Task, ValidConfig};
use belfry_coordinator::evaluation_file;
use belfry_model::{ManagerTower, Weights};
use belfry_worker::{checkpoint_parameters, checkpoint_steps, open_device, weights};
use clap::Args;
use serde_json::Value;
use shard_tools::manifest::sha256;
use shard_tools::store::Root;

use crate::weights::{open_run, with_files};

/// Which trained model.
#[derive(Args, Clone, Debug)]
pub struct TrainedArguments {
    /// The root of a run: a folder or an s3:// URL.
    #[arg(long, value_name = "ROOT", conflicts_with = "weights")]
    pub run: Option<String>,
    /// The checkpoint's step; default the newest.
    #[arg(long, requires = "run")]
    pub step: Option<u64>,
    /// The checkpoint that was best by this figure of the run's own evaluations, for instance
    /// vqa_score: of losses the lowest, else the highest.
    #[arg(long, value_name = "FIGURE", requires = "run", conflicts_with = "step")]
    pub best: Option<String>,
    /// A file of weights: a path or an s3:// URL; then with --config.
    #[arg(long, value_name = "FILE_OR_URL", requires = "config")]
    pub weights: Option<String>,
    /// The run file whose [model] the weights are of.
    #[arg(long, value_name = "FILE", requires = "weights")]
    pub config: Option<PathBuf>,
    /// Override a key; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub settings: Vec<String>,
}

/// A model with its numbers.
pub struct Trained {
    /// The resolved configuration.
    pub config: ValidConfig,
    /// Structure.
    pub model: Arc<ManagerTower>,
    /// On the device of `run.device`.
    pub weights: Weights,
    /// SHA-256 of the parameters, flat in name order, little-endian.
    pub sha256: String,
    /// The state's step, where it is a run's.
    pub step: Option<u64>,
    /// For people.
    pub origin: String,
}

impl TrainedArguments {
    /// Reads configuration and numbers, with `more` settings laid over.
    pub async fn open(&self, more: &[String]) -> anyhow::Result<Trained> {
        let mut settings = self.settings.clone();
        settings.extend_from_slice(more);
        let (config, parameters, step, origin) = match (&self.run, &self.weights) {
            (Some(run), _) => self.of_run(run, &settings).await?,
            (None, Some(file)) => self.of_file(file, settings).await?,
            (None, None) => {
                bail!("which model? give --run ROOT, or --weights FILE with --config RUN.toml")
            }
        };
        let trained = move || {
            let device = open_device(&config.run.device)?.without_autodiff();
            let model = ManagerTower::new(&config.model, config.data.text_len as usize)?;
            let weights = Weights::load(model.table(), &parameters, &device)?;
            let mut weights = weights.multiplied_in(config.precision.matmul);
            if config.run.device == CPU_APART {
                weights = weights.apart_from_host();
            }
            let bytes: Vec<u8> = parameters.iter().flat_map(|p| p.to_le_bytes()).collect();
            Ok::<_, anyhow::Error>(Trained {
                sha256: sha256(&bytes),
                model: Arc::new(model),
                config,
                weights,
                step,
                origin,
            })
        };
        tokio::task::spawn_blocking(trained).await?
    }

    async fn of_run(
        &self,
        run: &str,
        settings: &[String],
    ) -> anyhow::Result<(ValidConfig, Vec<f32>, Option<u64>, String)> {
        let (root, config) = open_run(run, settings).await?;
        let step = match &self.best {
            Some(figure) => Some(best_step(&root, figure).await?),
            None => self.step,
        };
        let model = ManagerTower::new(&config.model, config.data.text_len as usize)?;
        let (step, parameters) = checkpoint_parameters(&root, &model, step).await?;
        Ok((
            config,
            parameters,
            Some(step),
            format!("{run} at step {step}"),
        ))
    }

    async fn of_file(
        &self,
        file: &str,
        settings: Vec<String>,
    ) -> anyhow::Result<(ValidConfig, Vec<f32>, Option<u64>, String)> {
        let run_file = self
            .config
            .as_ref()
            .context("--config: name the run file")?;
        let settings = with_files(settings, &[file.to_owned()], &[]);
        let config = belfry_configs::load(run_file, &settings)?;
        let model = ManagerTower::new(&config.model, config.data.text_len as usize)?;
        let targets = weights::Targets::from(model.table());
        let fresh = model.table().init(config.run.seed);
        let (parameters, report) = weights::import(&config.init, &targets, fresh).await?;
        let mut entries = model.table().entries().iter().filter(|e| e.trained);
        if let Some(missing) = entries.find(|entry| !report.holds(&entry.name)) {
            bail!(
                "{file} holds no `{}`, which a model of task {} has: it was not trained for this",
                missing.name,
                task_name(config.model.task)
            );
        }
        Ok((config, parameters, None, file.to_owned()))
    }
}

impl Trained {
    /// Refuses a model of another task.
    pub fn must_be(&self, tasks: &[Task], command: &str) -> anyhow::Result<()> {
        let task = self.config.model.task;
        let names: Vec<&str> = tasks.iter().map(|task| task_name(*task)).collect();
        ensure!(
            tasks.contains(&task),
            "{}: `{command}` needs a model of task {}, and this one is of {}",
            self.origin,
            names.join(" or "),
            task_name(task)
        );
        Ok(())
    }
}

/// A task as a run file writes it.
pub fn task_name(task: Task) -> &'static str {
    match task {
        Task::Pretrain => "pretrain",
        Task::PretrainItc => "pretrain_itc",
        Task::Vqa => "vqa",
        Task::SnliVe => "snli_ve",
        Task::Nlvr2 => "nlvr2",
        Task::Retrieval => "retrieval",
    }
}

/// The step whose evaluation has the best `figure` among those with a checkpoint; of equals the
/// earlier one.
async fn best_step(root: &Root, figure: &str) -> anyhow::Result<u64> {
    let mut judged = Vec::new();
    let mut known = std::collections::BTreeSet::new();
    for step in checkpoint_steps(root).await? {
        let Ok(bytes) = root.get(&evaluation_file(step)).await else {
            continue;
        };
        let evaluation: Value = serde_json::from_slice(&bytes)
            .with_context(|| format!("{root}/{}", evaluation_file(step)))?;
        let numbers = evaluation.as_object().into_iter().flatten();
        known.extend(
            numbers
                .filter(|(_, v)| v.is_f64())
                .map(|(name, _)| name.clone()),
        );
        judged.extend(evaluation[figure].as_f64().map(|value| (step, value)));
    }
    best_of(&judged, figure).with_context(|| {
        format!(
            "--best {figure}: no checkpoint of {root} has it in its evaluation; figures that are \
             there: {known:?}"
        )
    })
}

fn best_of(judged: &[(u64, f64)], figure: &str) -> Option<u64> {
    let lower = figure.ends_with("_loss");
    let worth = |value: f64| if lower { -value } else { value };
    let mut best: Option<(u64, f64)> = None;
    for (step, value) in judged.iter().map(|(step, value)| (*step, worth(*value))) {
        if best.is_none_or(|(_, most)| value > most) {
            best = Some((step, value));
        }
    }
    best.map(|(step, _)| step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_loss_is_the_lowest_and_the_earlier_of_equals() {
        let judged = [(4, 0.5), (8, 0.75), (12, 0.75), (16, 0.25)];
        assert_eq!(best_of(&judged, "itm_accuracy"), Some(8));
        assert_eq!(best_of(&judged, "mlm_loss"), Some(16));
        assert_eq!(best_of(&[], "mlm_loss"), None);
    }
}
