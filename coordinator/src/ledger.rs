//! The ledger: one receipt per committed step, deterministic fields only, below `ledger/` of the
//! run's root. Written by the coordinator, read by whoever wants to know what was trained.

use std::collections::BTreeMap;

use belfry_proto::v1;
use bytes::Bytes;
use serde_json::{Value, json};
use shard_tools::store::{Created, Root};

use crate::error::CoordinatorError;

/// The ledger's folder, relative to the run's root.
const FOLDER: &str = "ledger";

/// A receipt as its line of JSON says it.
pub fn to_json(r: &v1::StepRecord) -> Value {
    json!({
        "step": r.step, "mlm_loss": r.mlm_loss, "itm_loss": r.itm_loss,
        "mlm_accuracy": r.mlm_accuracy, "itm_accuracy": r.itm_accuracy,
        "mlm_masked": r.mlm_masked, "pairs": r.pairs,
        "unmasked_micro_batches": r.unmasked_micro_batches,
        "sum_digest": r.sum_digest, "pairs_digest": r.pairs_digest,
    })
}

fn from_json(line: &str) -> Result<v1::StepRecord, String> {
    let value: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let count = |key: &str| {
        let found = value[key].as_u64();
        found.ok_or_else(|| format!("a receipt without `{key}`"))
    };
    let number = |key: &str| {
        let found = value[key].as_f64();
        found.ok_or_else(|| format!("a receipt without `{key}`"))
    };
    let text = |key: &str| {
        let found = value[key].as_str().map(str::to_owned);
        found.ok_or_else(|| format!("a receipt without `{key}`"))
    };
    Ok(v1::StepRecord {
        step: count("step")?,
        mlm_loss: number("mlm_loss")?,
        itm_loss: number("itm_loss")?,
        mlm_accuracy: number("mlm_accuracy")?,
        itm_accuracy: number("itm_accuracy")?,
        mlm_masked: count("mlm_masked")?,
        pairs: count("pairs")?,
        unmasked_micro_batches: count("unmasked_micro_batches")? as u32,
        sum_digest: text("sum_digest")?,
        pairs_digest: text("pairs_digest")?,
    })
}

/// All receipts, by step.
///
/// # Errors
/// [`CoordinatorError`], naming the file.
pub async fn read(root: &Root) -> Result<BTreeMap<u64, v1::StepRecord>, CoordinatorError> {
    let listed = root.list(FOLDER).await;
    let listed = listed.map_err(|e| CoordinatorError::store("cannot list the ledger", e))?;
    let mut receipts = BTreeMap::new();
    for (file, _) in listed {
        let bytes = root.get(&file).await;
        let bytes = bytes.map_err(|e| CoordinatorError::store("cannot read the ledger", e))?;
        for (number, line) in String::from_utf8_lossy(&bytes).lines().enumerate() {
            let receipt = from_json(line).map_err(|reason| CoordinatorError::Corrupt {
                file: file.clone(),
                reason: format!("line {}: {reason}", number + 1),
            })?;
            receipts.insert(receipt.step, receipt);
        }
    }
    Ok(receipts)
}

/// Writes receipts, ascending, as one file; says so when another file of the same steps differs.
///
/// # Errors
/// [`shard_tools::store::StoreError`], naming the key.
pub async fn append(
    root: &Root,
    receipts: &[v1::StepRecord],
) -> Result<Option<String>, shard_tools::store::StoreError> {
    let (Some(first), Some(last)) = (receipts.first(), receipts.last()) else {
        return Ok(None);
    };
    let lines: Vec<String> = receipts.iter().map(|r| to_json(r).to_string()).collect();
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

    #[tokio::test]
    async fn what_is_written_is_read_and_a_difference_is_said() {
        let root = Root::open("memory://").expect("opens");
        let receipt = |step: u64, digest: &str| v1::StepRecord {
            step,
            mlm_loss: 0.1 + 0.2,
            sum_digest: digest.into(),
            ..Default::default()
        };
        let both = [receipt(3, "a"), receipt(4, "b")];
        assert_eq!(append(&root, &both).await.expect("writes"), None);
        assert_eq!(append(&root, &both).await.expect("is equal"), None);
        let found = read(&root).await.expect("reads");
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), [3, 4]);
        assert_eq!(found[&4].sum_digest, "b");
        let other = append(&root, &[receipt(3, "x"), receipt(4, "b")]).await;
        let told = other.expect("answers").expect("differs");
        assert!(told.contains("ledger/000000003-000000004.jsonl"), "{told}");
    }
}
