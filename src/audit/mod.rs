//! `belfry audit`: proves from a run's ledger which pairs were trained.
//!
//! The order of a run is a function of its configuration, its data and its journal. It is walked
//! again, each lane's digest of pair ids is compared with the receipt's, and the pairs of the lanes
//! that agree are marked. It reads manifests, ledger and journal; shards only to name what is missing.

mod receipts;
mod report;

use anyhow::{Context as _, bail};
use belfry_configs::ValidConfig;
use belfry_coordinator::core::LANE_DIGEST_BYTES;
use belfry_coordinator::{RESULT_FILE, checkpoints, identity, journal};
use belfry_data::{Quarantine, Replay, Replayed, Sequence, ShardRef, Split};
use belfry_proto::{Digest, Schedule, v1};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use shard_tools::manifest::Manifest;
use shard_tools::store::Root;

use crate::run::prepare::of_root;
use receipts::Receipts;
use report::{Fault, Report};

/// Steps that are walked at once: a lane of the paper's run takes 64 KB for them.
const CHUNK: usize = 64;

/// Arguments of `belfry audit`.
#[derive(Args)]
pub struct AuditArguments {
    /// Folder or URL of the run.
    #[arg(long, value_name = "ROOT")]
    run: String,
    /// Where the datasets of data.train are now, in order, if they are not where the run file says.
    #[arg(long, value_name = "PATH")]
    data: Vec<String>,
    /// Also print every pair of the unused tail.
    #[arg(long)]
    tail: bool,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
}

/// Audits; says whether the run is as it must be.
pub async fn audit(arguments: AuditArguments) -> anyhow::Result<bool> {
    let location = &arguments.run;
    let root = Root::existing(location).context("--run")?;
    let config = of_root(&root, &[]).await?;
    let Some(recorded) = identity::read(&root).await? else {
        bail!(
            "{root} has no {}: no worker began the run, or an earlier version of this program led it; \
             what it trained cannot be proved",
            identity::DATA_FILE
        );
    };
    let mut report = Report::new(&root, &config);
    let manifests = datasets(&arguments, &config, &recorded, &mut report).await?;
    if report.faults.is_empty() {
        let sequence = Sequence::open(&config, manifests.clone())?;
        let replay = walk(&root, &config, sequence, &mut report).await?;
        let paths = paths(&arguments, &config);
        report.name_pairs(&replay, &paths, &manifests).await;
        report.finish(&replay, arguments.tail);
    }
    match arguments.json {
        true => println!("{}", report.json()),
        false => print!("{report}"),
    }
    Ok(report.proved())
}

fn paths(arguments: &AuditArguments, config: &ValidConfig) -> Vec<String> {
    match arguments.data.is_empty() {
        true => config.data.train.paths().map(str::to_owned).collect(),
        false => arguments.data.clone(),
    }
}

/// The training manifests; one that is not the run's is a fault.
async fn datasets(
    arguments: &AuditArguments,
    config: &ValidConfig,
    recorded: &[v1::Dataset],
    report: &mut Report,
) -> anyhow::Result<Vec<Manifest>> {
    let paths = paths(arguments, config);
    let recorded = recorded.iter().filter(|d| d.key == Split::Train.key());
    let recorded: Vec<&v1::Dataset> = recorded.collect();
    if paths.len() != recorded.len() {
        let (named, trained) = (paths.len(), recorded.len());
        bail!("--data names {named} datasets, the run trained on {trained}");
    }
    let found = belfry_data::found(Split::Train, paths.iter().map(String::as_str)).await?;
    let mut manifests = Vec::new();
    for ((found, manifest), then) in found.into_iter().zip(recorded) {
        if found.manifest_sha256 != then.manifest_sha256 {
            report.fault(
                Fault::Dataset,
                format!(
                    "{}: its manifest has sha256 {} ({} pairs), the run trained on {} ({} pairs): \
                     bring back what was there, or name its place by --data",
                    found.path,
                    found.manifest_sha256,
                    found.pairs,
                    then.manifest_sha256,
                    then.pairs
                ),
            );
        }
        manifests.push(manifest);
    }
    Ok(manifests)
}

/// Walks the whole ledger.
async fn walk(
    root: &Root,
    config: &ValidConfig,
    sequence: Sequence,
    report: &mut Report,
) -> anyhow::Result<Replay> {
    let entry = journal::newest(root).await?;
    let quarantine = entry.map(|e| e.quarantine).unwrap_or_default();
    let quarantine: Schedule = quarantine.into_iter().map(v1::Shard::from).collect();
    // A finished run has all its receipts; a checkpoint's manifest follows those before it.
    let expected = match root.exists(RESULT_FILE).await? {
        true => config.run.steps,
        false => checkpoints(root).await?.last().copied().unwrap_or(0),
    };
    report.finished = expected == config.run.steps;
    let style = ProgressStyle::with_template("step {pos}/{len} {bar:24} ETA {eta}");
    let bar = ProgressBar::new(expected).with_style(style.expect("a valid template"));
    let mut replay = Replay::new(sequence);
    let mut receipts = Receipts::open(root).await?;
    let mut steps = 0;
    loop {
        let mut chunk = Vec::new();
        while chunk.len() < CHUNK
            && let Some(receipt) = receipts.next().await?
        {
            chunk.push(receipt);
        }
        let Some(last) = chunk.last() else { break };
        steps = last.step + 1;
        check(&chunk, &mut replay, &quarantine, report);
        report.epochs(replay.close(steps));
        bar.set_position(steps);
    }
    bar.finish_and_clear();
    receipts.lacks_until(expected);
    for text in receipts.faults {
        report.fault(Fault::Ledger, text);
    }
    report.steps = steps.max(expected);
    report.epochs(replay.close(report.steps));
    report.quarantine(&quarantine, &replay);
    Ok(replay)
}

/// Compares receipts with the order, and marks the pairs of the lanes that agree.
fn check(
    receipts: &[v1::StepRecord],
    replay: &mut Replay,
    quarantine: &Schedule,
    report: &mut Report,
) {
    let without = |receipt: &v1::StepRecord| -> Quarantine {
        let shards = receipt.quarantine.iter().map(|s| ShardRef {
            dataset: s.dataset,
            shard: s.shard,
        });
        shards.collect()
    };
    let steps: Vec<(u64, Quarantine)> = receipts.iter().map(|r| (r.step, without(r))).collect();
    let agrees = |index: usize, lane: u32, digest: u128| {
        told(&receipts[index], lane) == Some(&digest.to_le_bytes()[..LANE_DIGEST_BYTES])
    };
    let replayed = replay.walk(&steps, agrees);
    let share = replay.sequence().pairs_per_lane_step();
    for (receipt, order) in receipts.iter().zip(&replayed) {
        report.receipts += 1;
        let journaled = quarantine.at(receipt.step);
        if !journaled.eq(receipt.quarantine.iter()) {
            let text = "its receipt names other shards under quarantine than the journal";
            report.fault(Fault::Step, format!("step {}: {text}", receipt.step));
        }
        compare(receipt, order, share, report);
    }
}

/// A lane's part of the receipt's digests.
fn told(receipt: &v1::StepRecord, lane: u32) -> Option<&[u8]> {
    let mut lanes = receipt.lane_digests.chunks(LANE_DIGEST_BYTES);
    lanes.nth(lane as usize)
}

fn compare(receipt: &v1::StepRecord, order: &Replayed, share: u64, report: &mut Report) {
    let step = receipt.step;
    let lanes = order.digests.len() as u64;
    let faults_before = report.found;
    if receipt.lane_digests.len() != order.digests.len() * LANE_DIGEST_BYTES {
        let text = format!("step {step}: its receipt is not of {lanes} lanes");
        report.fault(Fault::Step, text);
    }
    for (lane, digest) in (0u32..).zip(&order.digests) {
        report.lanes += 1;
        if told(receipt, lane) != Some(&digest.to_le_bytes()[..LANE_DIGEST_BYTES]) {
            let text = "its receipt says other pairs than the order gives it";
            report.fault(Fault::Lane, format!("step {step}, lane {lane}: {text}"));
        }
    }
    let folded = order.digests.iter().map(|digest| Digest(*digest));
    let folded = folded.fold(Digest(0), Digest::fold).to_string();
    let first = step * share;
    let counts = [
        ("pairs", receipt.pairs, lanes * share),
        ("first position", receipt.first_position, first),
        ("last position", receipt.last_position, first + share - 1),
        ("substituted pairs", receipt.substituted, order.substituted),
    ];
    for (what, told, must) in counts {
        if told != must {
            let text = format!("step {step}: its receipt says {what} {told}, the order {must}");
            report.fault(Fault::Step, text);
        }
    }
    // One wrong lane is named as such, not twice.
    if receipt.pairs_digest != folded && report.found == faults_before {
        let text = "its receipt's pairs_digest is not that of its lanes";
        report.fault(Fault::Step, format!("step {step}: {text}"));
    }
}
