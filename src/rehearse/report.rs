//! What a rehearsal came to, as a page and as JSON.

use std::fmt::Write as _;

use belfry_simulator::Request;
use serde_json::{Value, json};
use shard_tools::looks::thousands;

use super::Rehearsal;
use super::outcome::Outcome;
use super::scenario::Time;
use crate::bench::table::gigabytes;
use crate::plan::{duration, percent};

/// Hours of a month, as stores bill.
const MONTH_HOURS: f64 = 730.0;
/// Columns of a label.
const LABEL: usize = 15;

/// What the store costs, in dollars.
struct Bill {
    requests: f64,
    storage: f64,
}

impl Rehearsal {
    /// All runs as one; there is at least one.
    fn all(&self) -> Outcome {
        Outcome::merged(&self.outcomes).expect("--runs is at least 1")
    }

    /// Of one run, on average. Checkpoints are kept as they are written, so half of them are stored
    /// on average.
    fn bill(&self, all: &Outcome) -> Bill {
        let runs = self.outcomes.len() as f64;
        let [writes, reads] = all.requests();
        let requests = writes as f64 * self.prices.price_put + reads as f64 * self.prices.price_get;
        let months = self.scenario.millis as f64 / 3.6e6 / MONTH_HOURS;
        let kept = all.counts.checkpoints as f64 / runs * self.footprint.state_bytes as f64 / 2.0;
        Bill {
            requests: requests / 1000.0 / runs,
            storage: kept / 1e9 * months * self.prices.price_storage,
        }
    }

    pub(super) fn text(&self) -> String {
        let all = self.all();
        let mut text = self.head();
        self.progress(&mut text, &all);
        self.losses(&mut text, &all);
        self.store(&mut text, &all);
        text
    }

    fn head(&self) -> String {
        let (cluster, scenario) = (&self.cluster, &self.scenario);
        let hours = scenario.millis as f64 / 3.6e6;
        let runs = self.outcomes.len() as u64;
        let seeds = format!("seeds {}..{}", self.seed, self.seed + runs);
        let mut text = format!(
            "rehearsal of {}: {} workers, {hours} hours, {runs} runs ({seeds})\n",
            self.config.run.name, cluster.workers
        );
        let of = |millis: u64| match millis {
            0 => "never".to_owned(),
            millis => format!("every {}", duration(millis as f64 / 1e3)),
        };
        let (worker, coordinator) = (scenario.mtbf.worker_ms, scenario.mtbf.coordinator_ms);
        let run = worker / u64::from(cluster.workers);
        line(
            &mut text,
            "deaths",
            &format!(
                "a worker {}, so the same one {}; a coordinator {}",
                of(run),
                of(worker),
                of(coordinator)
            ),
        );
        line(
            &mut text,
            "restart",
            &format!(
                "{} after a death, a quarter more or less; {} coordinator(s)",
                cluster.restart.text(),
                cluster.coordinators
            ),
        );
        line(
            &mut text,
            "network",
            &format!(
                "{} Gbit/s between workers, {} to the store",
                cluster.bandwidth, cluster.store_bandwidth
            ),
        );
        let step = duration(scenario.step_ms / 1e3);
        line(
            &mut text,
            "a step",
            &format!("{step} undisturbed; a lane {}", self.lane.origin),
        );
        text.push('\n');
        text
    }

    fn progress(&self, text: &mut String, all: &Outcome) {
        let runs = &self.outcomes;
        let goodputs: Vec<f64> = runs.iter().map(Outcome::goodput).collect();
        let (least, most) = spread(&goodputs);
        line(
            text,
            "goodput",
            &format!(
                "{} of the time is undisturbed steps (runs: {} to {})",
                percent(all.goodput()),
                percent(least),
                percent(most)
            ),
        );
        let mean = |count: u64| thousands((count as f64 / runs.len() as f64).round() as u64);
        let lanes = self.config.batch.lanes;
        let again = all.lanes_again(lanes);
        let share = again as f64 / (all.counts.lanes.max(1)) as f64;
        line(
            text,
            "steps",
            &format!(
                "{} committed a run; {} committed again after a loss of everybody",
                mean(all.counts.steps),
                mean(all.counts.steps_again)
            ),
        );
        line(
            text,
            "lanes",
            &format!(
                "{} computed a run, {} as audits, {} ({}) again: of steps that a death interrupted",
                mean(all.counts.lanes),
                mean(all.counts.audits),
                mean(again),
                percent(share)
            ),
        );
        let (steps, lost) = (self.config.run.steps as f64, all.goodput());
        if lost > 0.0 {
            let undisturbed = steps * self.scenario.step_ms / 1e3;
            line(
                text,
                "the run",
                &format!(
                    "{} undisturbed, {} like this ({} steps)",
                    duration(undisturbed),
                    duration(undisturbed / lost),
                    thousands(self.config.run.steps)
                ),
            );
        }
        let seconds = |millis: u64| duration(millis as f64 / 1e3);
        line(
            text,
            "stalls",
            &format!(
                "{} a run: median {}, 99 of 100 {}, worst {} beyond a step",
                mean(all.stalls.len() as u64),
                seconds(all.stall(0.5)),
                seconds(all.stall(0.99)),
                seconds(all.stall(1.0))
            ),
        );
        let died = |kind: &str| all.counts.faults.get(kind).copied().unwrap_or(0);
        line(
            text,
            "survived",
            &format!(
                "{} deaths of workers, {} of coordinators a run; {} generations, {} terms",
                mean(died("worker killed")),
                mean(died("coordinator killed")),
                mean(all.counts.generations),
                mean(all.counts.terms)
            ),
        );
    }

    fn losses(&self, text: &mut String, all: &Outcome) {
        text.push_str("\nwhere the rest of the time went\n");
        for (what, millis) in all.losses.ranked() {
            let share = percent(millis.max(0.0) / all.millis as f64);
            let time = duration(millis.max(0.0) / 1e3 / self.outcomes.len() as f64);
            let _ = writeln!(text, "  {what:<34}{share:>8}  {time} a run");
        }
    }

    fn store(&self, text: &mut String, all: &Outcome) {
        let runs = self.outcomes.len() as f64;
        let mean = |count: u64| thousands((count as f64 / runs).round() as u64);
        text.push_str("\nthe object store, a run (training data aside)\n");
        line(
            text,
            "checkpoints",
            &format!(
                "{} made durable, {} uploaded; {} copied between workers",
                mean(all.counts.checkpoints),
                gigabytes(all.counts.checkpoint_bytes as f64 / runs),
                gigabytes(all.counts.copy_bytes as f64 / runs)
            ),
        );
        for (request, count) in &all.counts.requests {
            line(text, name(*request), &format!("{} requests", mean(*count)));
        }
        let bill = self.bill(all);
        let prices = &self.prices;
        line(
            text,
            "cost",
            &format!(
                "{} for requests, {} for storage of all checkpoints that long",
                dollars(bill.requests),
                dollars(bill.storage)
            ),
        );
        line(
            text,
            "",
            &format!(
                "at ${} / 1,000 PUT or LIST, ${} / 1,000 GET, ${} / GB and month",
                prices.price_put, prices.price_get, prices.price_storage
            ),
        );
    }

    pub(super) fn json(&self) -> Value {
        let all = self.all();
        let bill = self.bill(&all);
        let of_run = |outcome: &Outcome| {
            let counts = &outcome.counts;
            let requests = counts.requests.iter();
            let requests = requests.map(|(kind, n)| (name(*kind).to_owned(), json!(n)));
            json!({
                "goodput": outcome.goodput(), "steps": counts.steps,
                "steps_again": counts.steps_again, "lanes": counts.lanes,
                "lanes_audited": counts.audits,
                "lanes_again": outcome.lanes_again(self.config.batch.lanes),
                "stalls": outcome.stalls.len(),
                "stall_p50_seconds": outcome.stall(0.5) as f64 / 1e3,
                "stall_p99_seconds": outcome.stall(0.99) as f64 / 1e3,
                "stall_worst_seconds": outcome.stall(1.0) as f64 / 1e3,
                "generations": counts.generations, "terms": counts.terms,
                "faults": counts.faults, "checkpoints": counts.checkpoints,
                "checkpoint_bytes": counts.checkpoint_bytes, "copy_bytes": counts.copy_bytes,
                "requests": serde_json::Map::from_iter(requests),
                "losses_milliseconds": outcome.losses,
            })
        };
        json!({
            "run": self.config.run.name, "sha256": self.config.sha256(),
            "workers": self.cluster.workers, "coordinators": self.cluster.coordinators,
            "hours": self.scenario.millis as f64 / 3.6e6,
            "mtbf_worker_seconds": self.scenario.mtbf.worker_ms as f64 / 1e3,
            "mtbf_coordinator_seconds": self.scenario.mtbf.coordinator_ms as f64 / 1e3,
            "restart_seconds": self.cluster.restart.0, "lane": self.lane,
            "step_seconds": self.scenario.step_ms / 1e3, "seed": self.seed,
            "goodput": all.goodput(), "cost_requests_dollars": bill.requests,
            "cost_storage_dollars": bill.storage,
            "runs": self.outcomes.iter().map(of_run).collect::<Vec<_>>(),
        })
    }
}

fn line(text: &mut String, label: &str, what: &str) {
    let _ = writeln!(text, "  {}", format!("{label:<LABEL$}{what}").trim_end());
}

fn spread(values: &[f64]) -> (f64, f64) {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    (
        least,
        values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    )
}

fn dollars(amount: f64) -> String {
    match amount {
        amount if amount < 1.0 => format!("${amount:.4}"),
        amount => format!("${amount:.2}"),
    }
}

fn name(request: Request) -> &'static str {
    match request {
        Request::JournalPut => "PUT journal",
        Request::JournalGet => "GET journal",
        Request::JournalList => "LIST journal",
        Request::LedgerPut => "PUT ledger",
        Request::PartPut => "PUT parts",
        Request::PartGet => "GET parts",
        Request::ManifestPut => "PUT manifests",
        Request::OtherPut => "PUT others",
        Request::StartGet => "GET at starts",
    }
}

/// For headings of tables.
pub(super) fn every(millis: u64) -> String {
    Time(millis as f64 / 1e3).text()
}
