//! The figures of an evaluation by their names: which a task has, and which way is better.
//!
//! The one place where they stand. What they measure is the evaluator's business.

use crate::layers::ConfigError;
use crate::model::Task;
use crate::validate::refuse;

/// Of masked language modelling.
const MLM: [&str; 2] = ["mlm_loss", "mlm_accuracy"];
/// Of image-text matching.
const ITM: [&str; 2] = ["itm_loss", "itm_accuracy"];
/// Recalls of images for a text and of texts for an image among the first 1, 5 and 10, as shares of
/// queries, and their mean (model_spec 14).
const RECALLS: [&str; 7] = ["r_mean", "ir1", "ir5", "ir10", "tr1", "tr5", "tr10"];

/// The figures of a task's evaluation.
pub fn of(task: Task) -> Vec<&'static str> {
    match task {
        Task::Pretrain => [MLM, ITM].concat(),
        Task::Vqa => vec!["vqa_loss", "vqa_score"],
        Task::SnliVe => vec!["snli_ve_loss", "snli_ve_accuracy"],
        Task::Nlvr2 => vec!["nlvr2_loss", "nlvr2_accuracy"],
        Task::Retrieval | Task::PretrainItc => RECALLS.to_vec(),
    }
}

/// Whether the lower one is better: a loss. Of everything else the higher one is.
pub fn lower_is_better(name: &str) -> bool {
    name.ends_with("_loss")
}

/// How good a figure is: the greater, the better.
pub fn score(name: &str, value: f64) -> f64 {
    if lower_is_better(name) { -value } else { value }
}

/// # Errors
/// [`ConfigError::Invalid`] naming `key` and the names that `task` has.
pub(crate) fn check(key: &str, task: Task, name: &str) -> Result<(), ConfigError> {
    let known = of(task);
    if known.contains(&name) {
        return Ok(());
    }
    Err(refuse(
        key,
        format!(
            "this task's evaluation has no `{name}`; it has {}",
            known.join(", ")
        ),
    ))
}

/// Whether any task's evaluation has a figure of this name.
pub(crate) fn is_known(name: &str) -> bool {
    Task::ALL.into_iter().any(|task| of(task).contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_better_low_and_the_rest_high() {
        assert!(score("mlm_loss", 1.0) > score("mlm_loss", 2.0));
        assert!(score("r_mean", 2.0) > score("r_mean", 1.0));
        assert!(score("vqa_score", 0.7) > score("vqa_score", 0.6));
        assert!(of(Task::Retrieval).contains(&"tr10") && of(Task::Retrieval).len() == 7);
    }

    #[test]
    fn a_name_of_another_task_is_refused_with_those_there_are() {
        let told = check("checkpoint.keep_best.metric", Task::Vqa, "mlm_loss");
        let told = told.expect_err("refused").to_string();
        assert!(told.contains("vqa_score") && told.starts_with("checkpoint.keep_best.metric"));
        assert!(is_known("nlvr2_accuracy") && !is_known("loss"));
    }
}
