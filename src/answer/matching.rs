//! `belfry match`: how well captions match an image.

use std::path::PathBuf;

use belfry_configs::Task;
use clap::Args;
use serde_json::{Value, json};

use super::{Reader, probability};
use crate::trained::{Trained, TrainedArguments};

/// Arguments of `belfry match`.
#[derive(Args)]
pub struct MatchArguments {
    #[command(flatten)]
    trained: TrainedArguments,
    /// The image: JPEG, PNG, WebP, GIF or BMP.
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// A caption; may be repeated.
    #[arg(long = "caption", value_name = "TEXT", required = true, num_args = 1..)]
    captions: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Matches; see the module.
pub async fn match_captions(arguments: MatchArguments) -> anyhow::Result<()> {
    let trained = arguments.trained.open(&[]).await?;
    let tasks = [Task::Pretrain, Task::Retrieval, Task::PretrainItc];
    trained.must_be(&tasks, "belfry match")?;
    tokio::task::spawn_blocking(move || score(&arguments, &trained)).await?
}

fn score(arguments: &MatchArguments, trained: &Trained) -> anyhow::Result<()> {
    let reader = Reader::new(&trained.config)?;
    let pixels = reader.image(&arguments.image)?;
    let (model, weights) = (&trained.model, &trained.weights);
    let image = model.encode_images(weights, &pixels)?;
    let mut scored = Vec::with_capacity(arguments.captions.len());
    let size = trained.config.eval.pairs_per_batch as usize;
    for captions in arguments.captions.chunks(size) {
        let tokens = reader.texts(captions.iter().map(String::as_str))?;
        let texts = model.encode_texts(weights, &tokens.ids, &tokens.mask)?;
        let pairs: Vec<(usize, usize)> = (0..captions.len()).map(|text| (text, 0)).collect();
        let logits = model.pair_logits(weights, &texts, &image, &pairs)?;
        scored.extend(
            captions
                .iter()
                .zip(logits)
                .map(|(c, l)| (c, probability(l))),
        );
    }
    scored.sort_by(|a, b| b.1.total_cmp(&a.1));
    if arguments.json {
        let all = scored.iter();
        let all = all.map(|(caption, score)| json!({"caption": caption, "match": score}));
        let captions: Vec<Value> = all.collect();
        println!("{}", json!({"model": trained.origin, "captions": captions}));
        return Ok(());
    }
    for (caption, score) in scored {
        println!("{:>7.2} %  {caption}", 100.0 * score);
    }
    Ok(())
}
