//! `belfry ask`: the likeliest answers of a VQA model to a question about an image.

use std::path::PathBuf;

use anyhow::ensure;
use belfry_configs::Task;
use belfry_model::{ClassifyBatch, Labels, best};
use clap::Args;
use serde_json::{Value, json};

use super::Reader;
use crate::eval::report::answers;
use crate::trained::{Trained, TrainedArguments};

/// Arguments of `belfry ask`.
#[derive(Args)]
pub struct AskArguments {
    #[command(flatten)]
    trained: TrainedArguments,
    /// The image: JPEG, PNG, WebP, GIF or BMP.
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// The question.
    #[arg(long, value_name = "TEXT")]
    question: String,
    /// So many answers.
    #[arg(long, default_value_t = 5, value_name = "N")]
    top: usize,
    /// The answers, class i at place i: a JSON list. Default: answers.json of the run's data.
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Asks; see the module.
pub async fn ask(arguments: AskArguments) -> anyhow::Result<()> {
    ensure!(arguments.top > 0, "--top: must be at least 1");
    let trained = arguments.trained.open(&[]).await?;
    trained.must_be(&[Task::Vqa], "belfry ask")?;
    tokio::task::spawn_blocking(move || answer(&arguments, &trained)).await?
}

fn answer(arguments: &AskArguments, trained: &Trained) -> anyhow::Result<()> {
    let reader = Reader::new(&trained.config)?;
    let tokens = reader.texts([arguments.question.as_str()])?;
    let names = answers(arguments.answers.as_deref(), Some(&trained.config))?.unwrap_or_default();
    let classes = trained.model.classes().unwrap_or_default();
    ensure!(
        names.len() == classes,
        "--answers: {} answers, and the model has {classes} classes",
        names.len()
    );
    let batch = ClassifyBatch {
        micro_batches: 1,
        pairs: 1,
        text_len: tokens.ids.len(),
        ids: tokens.ids,
        text_mask: tokens.mask,
        images: vec![reader.image(&arguments.image)?],
        labels: Labels::Classes(Vec::new()),
    };
    let logits = trained.model.classify_logits(&trained.weights, &batch)?;
    let likeliest = best(&logits, arguments.top);
    // Each answer is judged for itself (model_spec 8), so scores do not sum to 1.
    let score = |logit: f32| 1.0 / (1.0 + (-f64::from(logit)).exp());
    if arguments.json {
        let all = likeliest.iter();
        let all =
            all.map(|(class, logit)| json!({"answer": names[*class], "score": score(*logit)}));
        let answers: Vec<Value> = all.collect();
        println!(
            "{}",
            json!({
                "model": trained.origin, "question": arguments.question, "answers": answers,
            })
        );
        return Ok(());
    }
    for (class, logit) in likeliest {
        println!("{:>7.2} %  {}", 100.0 * score(logit), names[class]);
    }
    Ok(())
}
