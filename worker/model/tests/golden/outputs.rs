//! Intermediate tensors, logits, labels and losses against the authors'.

use belfry_model::{Record, Trace, Weights, similarities};

use crate::Reached;
use crate::arrays::{Array, distance, flat};
use crate::cases::Case;
use crate::device::device;
use crate::runs::Outcome;

/// Compares everything under `out/` of every micro-batch or process.
pub fn check(case: &Case, ours: &Outcome, reached: &mut Reached) {
    check_losses(case, ours, reached);
    let prefixes = case.prefixes();
    for (name, theirs) in &case.io {
        let place = prefixes
            .iter()
            .position(|prefix| name.starts_with(prefix.as_str()));
        let Some(place) = place else {
            continue;
        };
        let Some(wanted) = name[prefixes[place].len()..].strip_prefix("out/") else {
            continue;
        };
        if wanted.ends_with("_loss") {
            continue;
        }
        match find(case, &prefixes[place], &ours.traces[place], wanted, theirs) {
            Some(error) => reached.output(wanted, error),
            None => reached.failures.push(format!("{name}: not understood")),
        }
    }
}

/// The error of the record that the authors call `wanted`.
fn find(case: &Case, prefix: &str, trace: &Trace, wanted: &str, theirs: &Array) -> Option<f64> {
    if let Some(task) = wanted.strip_suffix("_labels") {
        return labels(case, prefix, task, theirs);
    }
    if let Some(task) = wanted.strip_suffix("_logits") {
        let ends = [format!("{task}_score"), format!("{task}_classifier")];
        let logits = trace
            .records
            .iter()
            .rfind(|r| ends.iter().any(|end| r.name.ends_with(end)));
        return compare(logits?, theirs);
    }
    if wanted == "itc_targets" {
        let targets = by_name(trace, wanted)?;
        return if theirs.shape.len() == 1 {
            class_targets(targets, theirs)
        } else {
            compare(targets, theirs)
        };
    }
    if wanted.starts_with("itc_logits_") {
        return compare(by_name(trace, wanted)?, theirs);
    }
    let (pass, name) = wanted.split_once('/')?;
    let named = |name: &str| by_pass(trace, pass, name);
    let (stem, index) = name.rsplit_once('.').unwrap_or((name, ""));
    let stack = || -> Vec<&Record> { (0..).map_while(|i| named(&format!("{stem}.{i}"))).collect() };
    if stem == "image_ln_post" {
        // Ours count all of the tower's layers, theirs those that were looked at.
        let all = stack();
        let last = |count: usize| Some(&all[all.len().checked_sub(count)?..]);
        if theirs.shape.len() == 4 {
            let count = theirs.values.len() / all.first()?.values.len();
            return compare_stack(last(count)?, theirs);
        }
        let theirs_in_pass = case
            .io
            .keys()
            .filter(|key| key.starts_with(prefix) && is_indexed(key, pass, stem))
            .count();
        let index: usize = index.parse().ok()?;
        return compare(last(theirs_in_pass)?.get(index)?, theirs);
    }
    match named(name) {
        Some(record) if record.shape.len() == theirs.shape.len() => compare(record, theirs),
        Some(_) => compare_stack(&stack(), theirs),
        None => None,
    }
}

/// Whether a key is `…out/PASS/STEM.INDEX`.
fn is_indexed(key: &str, pass: &str, stem: &str) -> bool {
    let end = format!("out/{pass}/{stem}");
    key.rsplit_once('.')
        .is_some_and(|(stem, _)| stem.ends_with(&end))
}

fn by_pass<'a>(trace: &'a Trace, pass: &str, name: &str) -> Option<&'a Record> {
    let full = format!("{pass}/{name}");
    trace.records.iter().find(|r| r.name == full)
}

fn by_name<'a>(trace: &'a Trace, name: &str) -> Option<&'a Record> {
    let end = format!("/{name}");
    trace.records.iter().find(|r| r.name.ends_with(&end))
}

fn compare(ours: &Record, theirs: &Array) -> Option<f64> {
    (ours.shape == theirs.shape).then(|| distance(&ours.values, &theirs.values))
}

/// One of theirs against several of ours, stacked along its first or second axis: which one is not
/// told by equal sizes, but only one can be right.
fn compare_stack(ours: &[&Record], theirs: &Array) -> Option<f64> {
    let count = ours.len();
    let first = ours.first()?;
    let block = first.values.len() / first.shape[0];
    let values = theirs.values.len();
    if values != count * first.values.len() {
        return None;
    }
    let outer: Vec<f32> = ours.iter().flat_map(|r| r.values.clone()).collect();
    let rows = (0..first.shape[0]).flat_map(|row| ours.iter().map(move |r| (row, r)));
    let inner: Vec<f32> = rows
        .flat_map(|(row, r)| r.values[row * block..(row + 1) * block].to_vec())
        .collect();
    Some(distance(&outer, &theirs.values).min(distance(&inner, &theirs.values)))
}

/// Targets given as the place of the one that belongs to each row.
fn class_targets(ours: &Record, theirs: &Array) -> Option<f64> {
    let width = *ours.shape.last()?;
    let one_hot = ours.values.chunks(width).zip(&theirs.values);
    let errors = one_hot.map(|(row, place)| f64::from((row[*place as usize] - 1.0).abs()));
    Some(errors.fold(0.0, f64::max))
}

/// Labels are inputs or constants of the task; ours were made from the same files.
fn labels(case: &Case, prefix: &str, task: &str, theirs: &Array) -> Option<f64> {
    let rows = theirs.values.len();
    let input = |name: &str| {
        case.io
            .get(&format!("{prefix}{name}"))
            .map(|a| a.values.clone())
    };
    let ours = match task {
        "mlm" => input("in/text_labels_mlm"),
        "snli" => input("in/labels"),
        "nlvr2" => input("in/answers"),
        // The pairs first, then twice as many hard negatives.
        "itm" => input("rand/itm_labels").or_else(|| {
            Some(
                (0..rows)
                    .map(|row| f64::from(u8::from(3 * row < rows)))
                    .collect(),
            )
        }),
        _ => None,
    }?;
    (ours.len() == rows).then(|| {
        let pairs = ours.iter().zip(&theirs.values);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    })
}

/// Every loss that the authors' files name, of every micro-batch or process.
pub fn check_losses(case: &Case, ours: &Outcome, reached: &mut Reached) {
    let prefixes = case.prefixes();
    if prefixes.len() != ours.losses.len() {
        reached
            .failures
            .push(format!("losses of {} micro-batches", ours.losses.len()));
        return;
    }
    for (prefix, losses) in prefixes.iter().zip(&ours.losses) {
        let mut named = 0;
        for (key, theirs) in &case.io {
            let Some(name) = key
                .strip_prefix(prefix.as_str())
                .and_then(|k| k.strip_prefix("out/"))
            else {
                continue;
            };
            let Some(kind) = name.strip_suffix("_loss") else {
                continue;
            };
            let ours = match kind {
                "total" => Some(losses.values().sum()),
                _ => losses.get(name).copied(),
            };
            match ours {
                Some(ours) => {
                    reached.loss(&format!("{prefix}{name}"), (ours - theirs.values[0]).abs())
                }
                None => reached.failures.push(format!("{key}: not understood")),
            }
            named += 1;
        }
        if named == 0 {
            reached.failures.push(format!("`{prefix}` names no loss"));
        }
    }
}

/// What the authors' evaluation writes for pairs that it does not score.
const UNSCORED: f32 = -100.0;

/// Match logits of the best `k_test` texts of each image, and images of each text.
pub fn check_rerank(case: &Case) -> Reached {
    let mut reached = Reached::new(&case.name);
    let tower = case.tower();
    let params = flat(tower.table(), &case.model, "param");
    let weights = Weights::load(tower.table(), &params, &device()).unwrap();
    let (ids, mask) = (&case.io["in/text_ids"], &case.io["in/text_masks"]);
    let texts = tower
        .encode_texts(&weights, &ids.i32(), &mask.f32())
        .unwrap();
    let images = tower
        .encode_images(&weights, &case.io["in/images"].f32())
        .unwrap();
    let (m, n) = (case.io["in/images"].shape[0], ids.shape[0]);
    let near = similarities(&images, &texts);
    let k = case.json["k_test"].as_u64().unwrap() as usize;
    let best = |places: Vec<usize>| -> Vec<usize> {
        let all: Vec<f32> = places.iter().map(|place| near[*place]).collect();
        let nearest = belfry_model::best(&all, k).into_iter();
        nearest.map(|(nth, _)| places[nth]).collect()
    };
    // As an evaluation keeps them between the towers' one run and the fusion passes.
    let (kept_texts, kept_images) = (texts.to_host().unwrap(), images.to_host().unwrap());
    let text_rows: Vec<&[f32]> = kept_texts.rows.iter().map(Vec::as_slice).collect();
    let image_rows: Vec<&[f32]> = kept_images.rows.iter().map(Vec::as_slice).collect();
    let texts = tower
        .texts_from_host(&weights, (kept_texts.shape, &text_rows), &mask.f32())
        .unwrap();
    let images = tower
        .images_from_host(&weights, (kept_images.shape, &image_rows))
        .unwrap();
    let of_image = |i: usize| best((0..n).map(|j| i * n + j).collect());
    let of_text = |j: usize| best((0..m).map(|i| i * n + j).collect());
    let score = |places: Vec<usize>| {
        let pairs: Vec<(usize, usize)> = places.iter().map(|p| (p % n, p / n)).collect();
        let logits = tower
            .match_logits(&weights, &texts, &images, &pairs)
            .unwrap();
        let mut scores = vec![UNSCORED; m * n];
        places
            .iter()
            .zip(logits)
            .for_each(|(place, logit)| scores[*place] = logit);
        scores
    };
    let by_image = score((0..m).flat_map(of_image).collect());
    let by_text = score((0..n).flat_map(of_text).collect());
    let both = by_image
        .iter()
        .zip(&by_text)
        .map(|(a, b)| a.max(*b))
        .collect();
    for (name, ours) in [
        ("out/scores_image_to_text", by_image),
        ("out/scores_text_to_image", by_text),
        ("out/final", both),
    ] {
        match case.io.get(name) {
            Some(theirs) => reached.output(name, distance(&ours, &theirs.values)),
            None => reached.failures.push(format!("{name} is missing")),
        }
    }
    reached
}
