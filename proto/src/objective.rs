//! A task's objectives as numbers: sums over lanes, means over a step, and their names in JSON.
//!
//! Objectives are known by name and kept in the order in which a lane reports them, so that sums are
//! folded in one order. It refuses to know what a model computes them from.

use serde_json::{Value, json};

use crate::v1;

/// What the numbers of an objective called `name` are called.
fn keys(name: &str) -> [String; 4] {
    let score = if name == "vqa" { "score" } else { "accuracy" };
    ["loss", score, "rows", "empty"].map(|what| format!("{name}_{what}"))
}

/// The key of an objective's accuracy; VQA's soft one is a score.
pub fn accuracy_key(name: &str) -> String {
    let [_, accuracy, ..] = keys(name);
    accuracy
}

/// The key of an objective's loss.
pub fn loss_key(name: &str) -> String {
    let [loss, ..] = keys(name);
    loss
}

/// An objective of which nothing but its loss is known, a sum of micro-batches' means.
pub fn sum_of(name: &str, loss: f64) -> v1::ObjectiveSum {
    v1::ObjectiveSum {
        name: name.into(),
        loss,
        ..Default::default()
    }
}

/// An objective of which nothing but its mean loss is known.
pub fn mean_of(name: &str, loss: f64) -> v1::Objective {
    v1::Objective {
        name: name.into(),
        loss,
        ..Default::default()
    }
}

/// Adds `more` to `sums`, by name. A name that is new stands behind the others.
pub fn add(sums: &mut Vec<v1::ObjectiveSum>, more: &[v1::ObjectiveSum]) {
    for one in more {
        match sums.iter_mut().find(|sum| sum.name == one.name) {
            None => sums.push(one.clone()),
            Some(sum) => {
                sum.loss += one.loss;
                sum.score += one.score;
                sum.rows += one.rows;
                sum.empty += one.empty;
            }
        }
    }
}

/// Means over `micro_batches` micro-batches; one without a row adds zero and still counts.
pub fn means(sums: &[v1::ObjectiveSum], micro_batches: f64) -> Vec<v1::Objective> {
    let mean = |sum: &v1::ObjectiveSum| v1::Objective {
        name: sum.name.clone(),
        loss: sum.loss / micro_batches,
        accuracy: share(sum),
        rows: sum.rows,
        empty: sum.empty,
    };
    sums.iter().map(mean).collect()
}

/// Score over rows; 0 where no row was judged.
pub fn share(sum: &v1::ObjectiveSum) -> f64 {
    match sum.rows {
        0 => 0.0,
        rows => sum.score / rows as f64,
    }
}

/// An objective's numbers by the keys that they have in ledger, metrics and result.
pub fn figures(one: &v1::Objective) -> [(String, Value); 4] {
    let [loss, accuracy, rows, empty] = keys(&one.name);
    [
        (loss, json!(one.loss)),
        (accuracy, json!(one.accuracy)),
        (rows, json!(one.rows)),
        (empty, json!(one.empty)),
    ]
}

/// The objectives of an object that holds their [`figures`], in its order.
///
/// # Errors
/// The key that is missing.
pub fn from_figures(object: &Value) -> Result<Vec<v1::Objective>, String> {
    let names = object.as_object().into_iter().flatten();
    let names = names.filter_map(|(key, _)| key.strip_suffix("_loss"));
    let objective = |name: &str| {
        let [loss, accuracy, rows, empty] = keys(name);
        let missing = |key: &str| format!("no number `{key}`");
        let number = |key: &str| object[key].as_f64().ok_or_else(|| missing(key));
        let count = |key: &str| object[key].as_u64().ok_or_else(|| missing(key));
        let too_many = |_| format!("`{empty}` is too large");
        Ok(v1::Objective {
            name: name.into(),
            loss: number(&loss)?,
            accuracy: number(&accuracy)?,
            rows: count(&rows)?,
            empty: u32::try_from(count(&empty)?).map_err(too_many)?,
        })
    };
    names.map(objective).collect()
}

/// A figure of an evaluation, if it has it.
pub fn figure(evaluated: &v1::Evaluated, name: &str) -> Option<f64> {
    let found = evaluated.figures.iter().find(|figure| figure.name == name);
    found.map(|figure| figure.value)
}

/// A figure in words: `MLM loss 7.1234`, `NLVR2 accuracy 0.652`, `IR@1 0.500`.
pub fn told(figure: &v1::Figure) -> String {
    let v1::Figure { name, value } = figure;
    if let Some(name) = name.strip_suffix("_loss") {
        return format!("{} loss {value:.4}", title(name));
    }
    match name.rsplit_once('_') {
        Some((name, what @ ("accuracy" | "score"))) => {
            format!("{} {what} {value:.3}", title(name))
        }
        _ => format!("{} {value:.3}", recall(name)),
    }
}

/// An objective's name as people write it.
pub fn title(name: &str) -> String {
    name.to_uppercase().replace('_', "-")
}

fn recall(name: &str) -> String {
    match name.strip_prefix("ir").or(name.strip_prefix("tr")) {
        Some(rank) if rank.parse::<u32>().is_ok() => {
            format!("{}@{rank}", name[..2].to_uppercase())
        }
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_added_by_name_and_divided_once() {
        let sum = |name: &str, loss, score, rows| v1::ObjectiveSum {
            score,
            rows,
            empty: u32::from(rows == 0),
            ..sum_of(name, loss)
        };
        let mut all = Vec::new();
        add(
            &mut all,
            &[sum("mlm", 2.0, 1.0, 4), sum("itm", 1.0, 2.0, 2)],
        );
        add(
            &mut all,
            &[sum("mlm", 0.0, 0.0, 0), sum("itm", 2.0, 0.0, 2)],
        );
        let means = means(&all, 2.0);
        assert_eq!(
            (means[0].loss, means[0].accuracy, means[0].empty),
            (1.0, 0.25, 1)
        );
        assert_eq!(
            (means[1].loss, means[1].accuracy, means[1].rows),
            (1.5, 0.5, 4)
        );
    }

    #[test]
    fn figures_are_read_as_they_were_written() {
        let objective = |name: &str| v1::Objective {
            accuracy: 1.0 / 3.0,
            rows: 7,
            empty: 2,
            ..mean_of(name, 0.1 + 0.2)
        };
        let objectives = vec![objective("snli_ve"), objective("vqa")];
        let written = objectives.iter().flat_map(figures).collect();
        let written = Value::Object(written);
        assert_eq!(written["vqa_score"], json!(1.0 / 3.0));
        assert_eq!(from_figures(&written), Ok(objectives));
        let refused = from_figures(&json!({ "mlm_loss": 1.0 }));
        assert_eq!(refused, Err("no number `mlm_accuracy`".into()));
    }

    #[test]
    fn figures_are_told_as_people_write_them() {
        let told = |name: &str, value| {
            super::told(&v1::Figure {
                name: name.into(),
                value,
            })
        };
        assert_eq!(told("mlm_loss", 7.12345), "MLM loss 7.1235");
        assert_eq!(told("snli_ve_accuracy", 0.5), "SNLI-VE accuracy 0.500");
        assert_eq!(told("vqa_score", 0.5), "VQA score 0.500");
        assert_eq!(told("ir10", 0.25), "IR@10 0.250");
        assert_eq!(told("r_mean", 0.25), "r_mean 0.250");
    }
}
