//! The ledger: one receipt per committed step, deterministic fields only, below `ledger/` of the
//! run's root. Written by the coordinator, read by whoever wants to know what was trained.
//!
//! A receipt is a line of JSON: about 400 bytes and, for each lane, 16 hexadecimal digits of the
//! digest of its pair ids.

use std::collections::BTreeMap;
use std::ops::Range;

use belfry_proto::{objective, v1};
use bytes::Bytes;
use serde_json::{Map, Value, json};
use shard_tools::store::{Created, Root, StoreError};

use crate::core::LANE_DIGEST_BYTES;
use crate::error::CoordinatorError;
use crate::journal::Quarantined;

/// The ledger's folder, relative to the run's root.
pub const FOLDER: &str = "ledger";
/// More steps than one file holds: commits pause long before so many receipts wait.
const FILE_STEPS_MAX: u64 = 1 << 13;

/// A receipt's figures, as the ledger's line, the metrics and the result say them.
pub fn to_json(r: &v1::StepRecord) -> Value {
    let mut figures = Map::new();
    figures.insert("step".into(), json!(r.step));
    for one in &r.objectives {
        for (key, value) in objective::figures(one) {
            figures.insert(key, value);
        }
    }
    for (key, value) in [
        ("pairs", json!(r.pairs)),
        ("sum_digest", json!(r.sum_digest)),
        ("pairs_digest", json!(r.pairs_digest)),
    ] {
        figures.insert(key.into(), value);
    }
    Value::Object(figures)
}

/// A receipt as its line of the ledger.
pub fn to_line(r: &v1::StepRecord) -> String {
    let mut line = to_json(r);
    line["positions"] = json!([r.first_position, r.last_position]);
    let digits: Vec<String> = r.lane_digests.iter().map(|b| format!("{b:02x}")).collect();
    line["lanes"] = json!(digits.concat());
    if !r.quarantine.is_empty() {
        let shards = r.quarantine.iter().cloned().map(Quarantined::from);
        line["quarantine"] = json!(shards.collect::<Vec<_>>());
        line["substituted"] = json!(r.substituted);
    }
    if r.skipped {
        line["skipped"] = json!(true);
    }
    line.to_string()
}

/// A receipt from its line of the ledger.
///
/// # Errors
/// What is wrong with the line.
pub fn from_line(line: &str) -> Result<v1::StepRecord, String> {
    let value: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let count = |key: &str| {
        let found = value[key].as_u64();
        found.ok_or_else(|| format!("a receipt without `{key}`"))
    };
    let text = |key: &str| {
        let found = value[key].as_str().map(str::to_owned);
        found.ok_or_else(|| format!("a receipt without `{key}`"))
    };
    let Some(lanes) = value["lanes"].as_str() else {
        return Err(
            "a receipt without `lanes`: an earlier version of this program wrote it, and what was \
             trained cannot be proved from it"
                .into(),
        );
    };
    let positions = &value["positions"];
    let position = |at: usize| {
        positions[at]
            .as_u64()
            .ok_or("a receipt without `positions`")
    };
    let quarantine: Vec<Quarantined> = match value.get("quarantine") {
        Some(shards) => serde_json::from_value(shards.clone()).map_err(|e| e.to_string())?,
        None => Vec::new(),
    };
    Ok(v1::StepRecord {
        step: count("step")?,
        objectives: objective::from_figures(&value)?,
        pairs: count("pairs")?,
        sum_digest: text("sum_digest")?,
        pairs_digest: text("pairs_digest")?,
        first_position: position(0)?,
        last_position: position(1)?,
        lane_digests: bytes_of(lanes)?,
        substituted: value["substituted"].as_u64().unwrap_or(0),
        skipped: value["skipped"].as_bool().unwrap_or(false),
        quarantine: quarantine.into_iter().map(Into::into).collect(),
    })
}

/// Bytes from hexadecimal digits, whole lanes of them.
fn bytes_of(digits: &str) -> Result<Vec<u8>, String> {
    let wrong = || "`lanes` is not 16 hexadecimal digits per lane".to_owned();
    if !digits.is_ascii() || !digits.len().is_multiple_of(2 * LANE_DIGEST_BYTES) {
        return Err(wrong());
    }
    let bytes = (0..digits.len()).step_by(2);
    let bytes = bytes.map(|at| u8::from_str_radix(&digits[at..at + 2], 16));
    bytes.collect::<Result<_, _>>().map_err(|_| wrong())
}

/// The ledger's files in the order of their steps, relative to the root.
///
/// # Errors
/// [`CoordinatorError::Store`].
pub async fn files(root: &Root) -> Result<Vec<String>, CoordinatorError> {
    let listed = root.list(FOLDER).await;
    let listed = listed.map_err(|e| CoordinatorError::store("cannot list the ledger", e))?;
    Ok(listed.into_iter().map(|(file, _)| file).collect())
}

/// The receipts of one file, in its order; of a line that is none, what is wrong with it.
///
/// # Errors
/// [`CoordinatorError::Store`].
pub async fn receipts(
    root: &Root,
    file: &str,
) -> Result<Vec<Result<v1::StepRecord, String>>, CoordinatorError> {
    let bytes = root.get(file).await;
    let bytes = bytes.map_err(|e| CoordinatorError::store("cannot read the ledger", e))?;
    let text = String::from_utf8_lossy(&bytes);
    let lines = text.lines().enumerate();
    let named = |(number, line)| {
        let receipt = from_line(line);
        receipt.map_err(|reason| format!("line {}: {reason}", number + 1))
    };
    Ok(lines.map(named).collect())
}

/// The first step of a file of the ledger, by its name.
pub fn first_step(file: &str) -> Option<u64> {
    let steps = file.strip_prefix(FOLDER)?.strip_prefix('/')?;
    steps
        .strip_suffix(".jsonl")?
        .split_once('-')?
        .0
        .parse()
        .ok()
}

/// The last step of a file of the ledger, by its name.
fn last_step(file: &str) -> Option<u64> {
    let steps = file.strip_suffix(".jsonl")?;
    steps.rsplit_once('-')?.1.parse().ok()
}

/// Receipts of these steps, as `keep` leaves them, from only the files that hold them: a start reads
/// the ledger's end, however long it is.
///
/// # Errors
/// [`CoordinatorError`], naming the file.
pub async fn read(
    root: &Root,
    steps: Range<u64>,
    keep: impl Fn(v1::StepRecord) -> v1::StepRecord,
) -> Result<BTreeMap<u64, v1::StepRecord>, CoordinatorError> {
    let before = steps.start.saturating_sub(FILE_STEPS_MAX);
    let listed = root
        .list_after(FOLDER, &format!("{FOLDER}/{before:09}"))
        .await;
    let listed = listed.map_err(|e| CoordinatorError::store("cannot list the ledger", e))?;
    let mut all = BTreeMap::new();
    for (file, _) in listed {
        let ends_before = last_step(&file).is_some_and(|last| last < steps.start);
        if ends_before || first_step(&file).is_some_and(|first| first >= steps.end) {
            continue;
        }
        for receipt in receipts(root, &file).await? {
            let receipt = receipt.map_err(|reason| CoordinatorError::Corrupt {
                file: file.clone(),
                reason,
            })?;
            if steps.contains(&receipt.step) {
                all.insert(receipt.step, keep(receipt));
            }
        }
    }
    Ok(all)
}

/// Writes receipts, ascending, as one file; says so when another file of the same steps differs.
///
/// # Errors
/// [`StoreError`], naming the key.
pub async fn append(
    root: &Root,
    receipts: &[v1::StepRecord],
) -> Result<Option<String>, StoreError> {
    let (Some(first), Some(last)) = (receipts.first(), receipts.last()) else {
        return Ok(None);
    };
    let lines: Vec<String> = receipts.iter().map(to_line).collect();
    let file = format!("{FOLDER}/{:09}-{:09}.jsonl", first.step, last.step);
    let text = Bytes::from(lines.join("\n") + "\n");
    let created = root.create(&file, text.clone()).await?;
    if created == Created::Exists && root.get(&file).await? != text {
        return Ok(Some(format!(
            "{file} holds other receipts for the same steps"
        )));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt(step: u64, digest: &str) -> v1::StepRecord {
        v1::StepRecord {
            step,
            objectives: vec![
                objective::mean_of("mlm", 0.1 + 0.2),
                objective::mean_of("vqa", 2.0),
            ],
            sum_digest: digest.into(),
            first_position: 4 * step,
            last_position: 4 * step + 3,
            lane_digests: (0..16).collect(),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn what_is_written_is_read_and_a_difference_is_said() {
        let root = Root::open("memory://").expect("opens");
        let mut second = receipt(4, "b");
        second.substituted = 3;
        second.quarantine = vec![v1::Shard {
            dataset: 1,
            shard: 2,
            file: "000002.tar".into(),
            from_step: 4,
        }];
        let both = [receipt(3, "a"), second];
        assert_eq!(append(&root, &both).await.expect("writes"), None);
        assert_eq!(append(&root, &both).await.expect("is equal"), None);
        let found = read(&root, 0..9, |r| r).await.expect("reads");
        assert_eq!(found.into_values().collect::<Vec<_>>(), both);
        let other = append(&root, &[receipt(3, "x"), receipt(4, "b")]).await;
        let told = other.expect("answers").expect("differs");
        assert!(told.contains("ledger/000000003-000000004.jsonl"), "{told}");
    }

    /// Twenty thousand steps in files of ten; what is asked for lies across two of them.
    #[tokio::test]
    async fn a_start_reads_only_the_end_of_a_long_ledger() {
        let root = Root::open("memory://").expect("opens");
        for first in (0..20_000).step_by(10) {
            let file: Vec<_> = (first..first + 10).map(|s| receipt(s, "a")).collect();
            append(&root, &file).await.expect("writes");
        }
        let broken = Bytes::from_static(b"no receipt\n");
        let far = format!("{FOLDER}/000000990-000000999.jsonl");
        root.put(&far, broken.clone()).await.expect("writes");
        let near = format!("{FOLDER}/000019970-000019979.jsonl");
        root.put(&near, broken).await.expect("writes");
        let steps = |found: BTreeMap<u64, _>| found.into_keys().collect::<Vec<_>>();
        let found = read(&root, 19_985..19_995, |r| r)
            .await
            .expect("reads no more");
        assert_eq!(steps(found), (19_985..19_995).collect::<Vec<_>>());
        let found = read(&root, 19_960..19_970, |r| r)
            .await
            .expect("nor behind it");
        assert_eq!(steps(found), (19_960..19_970).collect::<Vec<_>>());
        let refused = read(&root, 19_979..u64::MAX, |r| r).await;
        let refused = refused.expect_err("is broken").to_string();
        assert!(refused.contains("000019970-000019979.jsonl"), "{refused}");
    }

    #[test]
    fn what_cannot_be_proved_from_is_refused_in_words() {
        let old = to_json(&receipt(3, "a")).to_string();
        let refused = from_line(&old).expect_err("has no lanes");
        assert!(refused.contains("cannot be proved"), "{refused}");
        for (from, to) in [("0f", "0g"), ("0f", "é"), ("0f", "")] {
            let line = to_line(&receipt(3, "a")).replace(from, to);
            let refused = from_line(&line).expect_err("is no digest");
            assert!(refused.contains("16 hexadecimal digits"), "{refused}");
        }
    }
}
