//! What a run makes durable besides its journal: receipts, manifests, evaluations, the result.
//!
//! One task writes them in the order in which the core asked, off the loop, each for as long as the
//! store takes; the answers are events. Everything is put only if absent or equal, so a repetition
//! harms nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use belfry_proto::{objective, v1};
use bytes::Bytes;
use serde_json::{Map, Value, json};
use shard_tools::store::{Created, Root, StoreError};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::core::{Durable, Event, RECEIPTS_KEPT, without_lanes};
use crate::error::CoordinatorError;
use crate::journal::{self, Entry};
use crate::persist::{Persist, Told};
use crate::{identity, ledger, stored};

/// Writes that may wait: the core has one checkpoint, one batch of receipts under way.
const JOBS_MAX: usize = 64;
/// How the run ended, relative to its root; its existence says that it did.
pub const RESULT_FILE: &str = "result.json";

/// Something to be made durable.
pub enum Job {
    /// Receipts, ascending.
    Receipts(Vec<v1::StepRecord>),
    /// A checkpoint: step, receipts that come before it, parts.
    Checkpoint(u64, Vec<v1::StepRecord>, Vec<v1::PartStored>),
    /// Delete the checkpoints of these steps.
    Prune(Vec<u64>),
    /// What a step's checkpoint cost.
    Cost(u64, v1::CheckpointMade),
    /// Nothing to write: receipts of these steps are wanted.
    Read(Range<u64>),
}

/// Starts the writing task; it ends when the sender is dropped and all is written.
pub fn open(
    root: Root,
    run_id: String,
    leader: Entry,
    persist: Persist,
) -> (mpsc::Sender<Job>, JoinHandle<()>) {
    let (jobs, mut queue) = mpsc::channel(JOBS_MAX);
    let archive = Archive {
        root,
        run_id,
        leader,
    };
    let task = tokio::spawn(async move {
        while let Some(job) = queue.recv().await {
            if let Job::Read(steps) = job {
                persist.tell(archive.receipts(&persist, steps).await).await;
                continue;
            }
            let what = named(&job);
            let told = match persist.until_done(&what, || archive.write(&job)).await {
                Ok(None) => match durable(&job) {
                    Some(event) => Told::Event(event),
                    None => continue,
                },
                Ok(Some(how)) => Told::Event(Event::StoreDiffers { what, how }),
                Err(error) => Told::End(error),
            };
            persist.tell(told).await;
        }
    });
    (jobs, task)
}

fn named(job: &Job) -> String {
    match job {
        Job::Receipts(_) => "the ledger".into(),
        Job::Checkpoint(step, ..) => format!("the checkpoint of step {step}"),
        Job::Prune(_) => "old checkpoints".into(),
        Job::Cost(step, _) => format!("what the checkpoint of step {step} cost"),
        Job::Read(_) => "the ledger's receipts".into(),
    }
}

/// What the core hears when it is done.
fn durable(job: &Job) -> Option<Event> {
    match job {
        Job::Receipts(receipts) => receipts.last().map(|last| Event::ReceiptsDurable {
            below: last.step + 1,
        }),
        Job::Checkpoint(step, ..) => Some(Event::CheckpointDurable { step: *step }),
        Job::Prune(_) | Job::Cost(..) | Job::Read(_) => None,
    }
}

struct Archive {
    root: Root,
    run_id: String,
    /// An entry of this leader.
    leader: Entry,
}

impl Archive {
    async fn receipts(&self, persist: &Persist, steps: Range<u64>) -> Told {
        let read = || read_receipts(&self.root, steps.clone());
        match persist.until_done("reading the ledger", read).await {
            Ok(receipts) => Told::Event(Event::ReceiptsRead {
                from: steps.start,
                receipts,
            }),
            Err(error) => Told::End(error),
        }
    }

    /// Says what differs from what stands there. Whoever leads no more writes nothing: what it would
    /// write late is the same bits, but a choice made since may stand beside it.
    async fn write(&self, job: &Job) -> Result<Option<String>, CoordinatorError> {
        let root = &self.root;
        journal::check_leads(root, &self.leader).await?;
        let written = match job {
            Job::Receipts(receipts) => ledger::append(root, receipts).await,
            Job::Checkpoint(step, receipts, parts) => {
                put_checkpoint(root, &self.run_id, *step, receipts, parts).await
            }
            Job::Prune(steps) => prune(root, steps).await,
            Job::Cost(step, made) => {
                let put = stored::put_cost(root, *step, made).await;
                put.map(|()| None)
            }
            Job::Read(_) => Ok(None),
        };
        written.map_err(|e| CoordinatorError::store(format!("cannot write {}", named(job)), e))
    }
}

/// Receipts first, the manifest last. Says what differs from what stands there.
async fn put_checkpoint(
    root: &Root,
    run_id: &str,
    step: u64,
    receipts: &[v1::StepRecord],
    parts: &[v1::PartStored],
) -> Result<Option<String>, StoreError> {
    if let Some(difference) = ledger::append(root, receipts).await? {
        return Ok(Some(difference));
    }
    stored::put_manifest(root, run_id, step, parts).await
}

/// Deletes checkpoints, one after the other; what is gone already is no error.
async fn prune(root: &Root, steps: &[u64]) -> Result<Option<String>, StoreError> {
    for step in steps {
        stored::delete(root, *step).await?;
    }
    Ok(None)
}

/// Where the evaluation of a step's state lies, relative to the run's root.
pub fn evaluation_file(step: u64) -> String {
    format!("metrics/evaluation-{step:09}.json")
}

/// Keeps an evaluation; says what differs from what stands there.
///
/// # Errors
/// [`CoordinatorError::Store`].
pub async fn put_evaluation(
    root: &Root,
    e: &v1::Evaluated,
) -> Result<Option<String>, CoordinatorError> {
    let file = evaluation_file(e.step);
    let put = create_or_equal(root, &file, &evaluation_json(e)).await;
    put.map_err(|e| CoordinatorError::store(format!("cannot write {file}"), e))
}

async fn create_or_equal(
    root: &Root,
    file: &str,
    value: &Value,
) -> Result<Option<String>, StoreError> {
    let text = Bytes::from(serde_json::to_vec_pretty(value).expect("plain data"));
    let created = root.create(file, text.clone()).await?;
    if created == Created::Exists && root.get(file).await? != text {
        return Ok(Some(format!("{file} says otherwise about the same step")));
    }
    Ok(None)
}

/// An evaluation as its file says it: the step, its figures by name, the pairs.
pub fn evaluation_json(e: &v1::Evaluated) -> Value {
    let mut value = Map::new();
    value.insert("step".into(), json!(e.step));
    for figure in &e.figures {
        value.insert(figure.name.clone(), json!(figure.value));
    }
    value.insert("pairs".into(), json!(e.pairs));
    Value::Object(value)
}

/// An evaluation in words: `MLM loss 7.1234, MLM accuracy 0.051, …`.
pub fn evaluation_told(e: &v1::Evaluated) -> String {
    let told = e.figures.iter().map(objective::told);
    told.collect::<Vec<_>>().join(", ")
}

/// Writes down how the run ended.
///
/// # Errors
/// [`CoordinatorError::Store`].
pub async fn put_result(
    root: &Root,
    exported: &v1::Exported,
    last: Option<&v1::StepRecord>,
    evaluations: &[v1::Evaluated],
) -> Result<(), CoordinatorError> {
    let evaluations: Vec<Value> = evaluations.iter().map(evaluation_json).collect();
    let result = json!({
        "step": exported.step,
        "parameters_sha256": exported.parameters_sha256,
        "optimizer_sha256": exported.optimizer_sha256,
        "export": exported.file,
        "last": last.map(ledger::to_json),
        "evaluations": evaluations,
    });
    let text = serde_json::to_vec_pretty(&result).expect("plain data");
    let put = root.put(RESULT_FILE, Bytes::from(text)).await;
    put.map_err(|e| CoordinatorError::store("cannot write result.json", e))
}

/// Steps of the checkpoints that a run may begin from.
///
/// # Errors
/// [`CoordinatorError::Store`].
pub async fn checkpoints(root: &Root) -> Result<BTreeSet<u64>, CoordinatorError> {
    let usable = stored::usable(root).await;
    usable.map_err(|e| CoordinatorError::store("cannot list the checkpoints", e))
}

/// What earlier terms made durable.
///
/// # Errors
/// [`CoordinatorError`], naming the file.
pub async fn read(root: &Root, journal: &Entry) -> Result<Durable, CoordinatorError> {
    let found = stored::list(root).await;
    let found = found.map_err(|e| CoordinatorError::store("cannot list the checkpoints", e))?;
    let steps = |wanted: fn(&stored::Stored) -> bool| -> BTreeSet<u64> {
        let found = found.values().filter(move |s| wanted(s));
        found.map(|stored| stored.step).collect()
    };
    let manifests = steps(stored::Stored::is_usable);
    // Steps before the newest checkpoint are not computed again, unless it cannot be loaded.
    let newest = manifests.last().copied().unwrap_or(0);
    let receipts_from = newest.saturating_sub(RECEIPTS_KEPT);
    let quarantine = journal.quarantine.iter().cloned().map(v1::Shard::from);
    Ok(Durable {
        entry: journal.seq,
        generation: journal.generation,
        committed: journal.committed,
        horizon: journal.horizon,
        members: journal.members.clone(),
        quarantine: quarantine.collect(),
        data: identity::read(root).await?,
        receipts: read_receipts(root, receipts_from..u64::MAX).await?,
        receipts_from,
        evaluations: evaluations(root).await?,
        manifests,
        corrupt: steps(|stored| stored.corrupt && stored.made.is_some()),
    })
}

/// The run's evaluations, by step.
///
/// # Errors
/// [`CoordinatorError`], naming the file.
pub async fn evaluations(root: &Root) -> Result<BTreeMap<u64, v1::Evaluated>, CoordinatorError> {
    let listed = root.list("metrics").await;
    let listed = listed.map_err(|e| CoordinatorError::store("cannot list the evaluations", e))?;
    let mut evaluations = BTreeMap::new();
    for (file, _) in listed {
        if !file.ends_with(".json") {
            continue;
        }
        let bytes = root.get(&file).await;
        let bytes = bytes.map_err(|e| CoordinatorError::store("cannot read an evaluation", e))?;
        let evaluated = parse_evaluation(&bytes)
            .map_err(|reason| CoordinatorError::Corrupt { file, reason })?;
        evaluations.insert(evaluated.step, evaluated);
    }
    Ok(evaluations)
}

async fn read_receipts(
    root: &Root,
    steps: Range<u64>,
) -> Result<BTreeMap<u64, v1::StepRecord>, CoordinatorError> {
    ledger::read(root, steps, |receipt| without_lanes(&receipt)).await
}

/// An evaluation from its file's text, or from its place in `result.json`.
///
/// # Errors
/// What is wrong with it.
pub fn parse_evaluation(bytes: &[u8]) -> Result<v1::Evaluated, String> {
    let value: Map<String, Value> = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let count = |key: &str| {
        let found = value.get(key).and_then(Value::as_u64);
        found.ok_or_else(|| format!("no `{key}`"))
    };
    let figure = |(name, value): (&String, &Value)| {
        let value = value.as_f64();
        let value = value.ok_or_else(|| format!("`{name}` is no number"))?;
        let name = name.clone();
        Ok(v1::Figure { name, value })
    };
    let figures = value
        .iter()
        .filter(|(name, _)| !["step", "pairs"].contains(&name.as_str()));
    Ok(v1::Evaluated {
        step: count("step")?,
        pairs: count("pairs")?,
        figures: figures.map(figure).collect::<Result<_, String>>()?,
        error: String::new(),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// A hundred thousand steps of 64 lanes, a checkpoint every thousand: what a start reads does not
    /// grow with the run.
    #[tokio::test]
    async fn a_start_reads_what_it_needs_of_a_long_run() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = Root::open(&folder.path().display().to_string()).expect("opens");
        let receipt = |step| v1::StepRecord {
            step,
            sum_digest: format!("{step:032x}"),
            lane_digests: vec![7; 64 * 8],
            ..Default::default()
        };
        for step in (1_000..=100_000).step_by(1_000) {
            let receipts: Vec<_> = (step - 1_000..step).map(receipt).collect();
            ledger::append(&root, &receipts).await.expect("writes");
            let manifest = crate::stored::manifest_file(step);
            root.put(&manifest, Bytes::from("{}"))
                .await
                .expect("writes");
        }
        let begun = Instant::now();
        let durable = read(&root, &Entry::default()).await.expect("reads");
        let needed = begun.elapsed();
        assert_eq!(durable.receipts_from, 100_000 - RECEIPTS_KEPT);
        assert_eq!(durable.receipts.len() as u64, RECEIPTS_KEPT);
        let begun = Instant::now();
        let all = read_receipts(&root, 0..u64::MAX).await.expect("reads");
        let whole = begun.elapsed();
        assert_eq!(all.len(), 100_000);
        println!("start at step 100,000: {needed:.2?} for the end, {whole:.2?} for all receipts");
        assert!(needed < whole / 4, "{needed:?} against {whole:?}");
    }
}
