//! Which checkpoints are kept: a pure function of what there is, of the run's settings and of its
//! evaluations.

use std::collections::{BTreeMap, BTreeSet};

use belfry_configs::{Checkpoint, figures};
use belfry_proto::{objective, v1};

/// The steps of `usable` that are kept: the last `keep_last` (0: all), every multiple of
/// `keep_every_steps`, and the best by `keep_best`. The newest always is.
pub fn kept(
    usable: &BTreeSet<u64>,
    settings: &Checkpoint,
    evaluations: &BTreeMap<u64, v1::Evaluated>,
) -> BTreeSet<u64> {
    let last = match settings.keep_last {
        0 => usable.len(),
        last => last as usize,
    };
    let mut kept: BTreeSet<u64> = usable.iter().rev().take(last).copied().collect();
    if settings.keep_every_steps > 0 {
        let multiple = |step: &&u64| step.is_multiple_of(settings.keep_every_steps);
        kept.extend(usable.iter().filter(multiple));
    }
    if let Some(best) = &settings.keep_best {
        let judged = best_first(usable, &best.metric, evaluations);
        kept.extend(judged.into_iter().take(best.count as usize));
    }
    kept
}

/// Those of `usable` that an evaluation gives the figure `metric`, the best first; of equals the
/// newer.
pub fn best_first(
    usable: &BTreeSet<u64>,
    metric: &str,
    evaluations: &BTreeMap<u64, v1::Evaluated>,
) -> Vec<u64> {
    let judged = usable.iter().filter_map(|step| {
        let value = objective::figure(evaluations.get(step)?, metric)?;
        (!value.is_nan()).then(|| (figures::score(metric, value), *step))
    });
    let mut judged: Vec<(f64, u64)> = judged.collect();
    judged.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    judged.into_iter().map(|(_, step)| step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use belfry_configs::KeepBest;

    fn settings(keep_last: u32, keep_every_steps: u64, best: Option<(u32, &str)>) -> Checkpoint {
        Checkpoint {
            keep_last,
            keep_every_steps,
            keep_best: best.map(|(count, metric)| KeepBest {
                count,
                metric: metric.into(),
            }),
            ..Checkpoint::default()
        }
    }

    fn kept_of(steps: &[u64], settings: &Checkpoint) -> Vec<u64> {
        let evaluated = |(step, itm_accuracy, mlm_loss): (u64, f64, f64)| {
            let figure = |name: &str, value| v1::Figure {
                name: name.into(),
                value,
            };
            let evaluated = v1::Evaluated {
                step,
                figures: vec![
                    figure("itm_accuracy", itm_accuracy),
                    figure("mlm_loss", mlm_loss),
                ],
                ..Default::default()
            };
            (step, evaluated)
        };
        let evaluations = [
            (10, 0.9, 3.0),
            (20, 0.9, f64::NAN),
            (30, 0.5, 1.0),
            (35, 1.0, 0.1),
        ];
        let evaluations = evaluations.into_iter().map(evaluated).collect();
        let steps = steps.iter().copied().collect();
        kept(&steps, settings, &evaluations).into_iter().collect()
    }

    #[test]
    fn the_last_the_multiples_and_the_best_are_kept() {
        let all = [10, 20, 30, 40, 50];
        assert_eq!(kept_of(&all, &settings(0, 0, None)), all);
        assert_eq!(kept_of(&all, &settings(2, 0, None)), [40, 50]);
        assert_eq!(kept_of(&all, &settings(9, 0, None)), all);
        assert_eq!(kept_of(&all, &settings(1, 20, None)), [20, 40, 50]);
        let best = |count, metric| kept_of(&all, &settings(1, 0, Some((count, metric))));
        assert_eq!(best(1, "itm_accuracy"), [20, 50], "the newer of equals");
        assert_eq!(best(2, "itm_accuracy"), [10, 20, 50]);
        assert_eq!(
            best(2, "mlm_loss"),
            [10, 30, 50],
            "no loss that is no number"
        );
        assert_eq!(kept_of(&[], &settings(1, 1, None)), [0; 0]);
    }
}
