//! `belfry run PLAN.toml`: a plan on this machine. Starts a scheduler and an agent, starts them again
//! when they die, tells how the stages go, and ends with the table of results.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use belfry_configs::plan::{self, Plan};
use belfry_proto::v1::{PlanRequest, PlanStatus};
use serde_json::Value;
use shard_tools::manifest::sha256;
use shard_tools::store::Root;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::client::Whereabouts;
use super::place::{self, RESULTS_FILE, RESULTS_TABLE};
use crate::files::replace;
use crate::run::child::{self, Child, Fate, QUICK_DEATHS_MAX};
use crate::run::{RunArguments, Stops, due};

/// How often children are looked after when none of them ended.
const TEND_INTERVAL: Duration = Duration::from_millis(100);
/// Between two looks at the plan.
const LOOK_PAUSE: Duration = Duration::from_millis(500);
/// Time that the two get to end in good order: the agent ends its own children within less.
const STOP_GRACE: Duration = Duration::from_secs(6);
/// Steps of a stage between two lines.
const LINES_PER_STAGE: u64 = 10;

const ROLES: [&str; 2] = ["scheduler", "agent"];

/// Runs the plan to its end; see the module.
pub async fn launch(arguments: RunArguments) -> anyhow::Result<()> {
    let begun = Instant::now();
    let file = &arguments.config;
    let plan = plan::load(file, &arguments.settings)?;
    check(&arguments, &plan)?;
    let runs = PathBuf::from("runs");
    let location = arguments.root.clone();
    let location = location.unwrap_or_else(|| runs.join(&plan.name).display().to_string());
    let root = Root::open(&location)?;
    let local = arguments.local.clone().or_else(|| root.local_folder());
    let local = local.unwrap_or_else(|| {
        let hash = sha256(root.to_string().as_bytes());
        runs.join(format!("{}-{}", plan.name, &hash[..8]))
    });
    let logs = local.join("logs");
    std::fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
    place::claim(&root, &plan, arguments.resume).await?;

    let mut child_ended = signal(SignalKind::child())?;
    let mut stops = Stops::listen()?;
    let mut pair = Pair::new(&arguments, &location, &local);
    let mut looks = watch(root.clone());
    let mut told = Told::default();
    let mut tending = tokio::time::interval(TEND_INTERVAL);
    let ended = loop {
        tokio::select! {
            Some(status) = looks.recv() => told.show(&status),
            () = due(&mut tending, &mut child_ended) => match pair.tend() {
                Ok(false) => {}
                Ok(true) => break Ok(()),
                Err(error) => break Err(error),
            },
            () = stops.next() => {
                pair.stop().await;
                bail!("stopped; go on with: belfry run {} --root {location} --resume", file.display());
            }
        }
    };
    let restarts = pair.restarts();
    pair.stop().await;
    // A plan that ended badly has results too.
    if root.exists(RESULTS_FILE).await? {
        finish(&root, begun, restarts).await?;
    }
    ended
}

/// What can be refused before anything starts.
fn check(arguments: &RunArguments, plan: &Plan) -> anyhow::Result<()> {
    let workers = arguments.workers;
    if arguments.standby {
        bail!("--standby: a plan's coordinators are started again where they die; leave it out");
    }
    let most = belfry_coordinator::plan::SLOTS_MAX;
    if workers == 0 || workers > most {
        bail!("--workers {workers}: 1 to {most} on one machine; `belfry agent` brings more");
    }
    if let Some(stage) = plan.stages.iter().find(|s| s.min_workers > workers) {
        let (name, min) = (&stage.name, stage.min_workers);
        bail!("--workers {workers}: stage `{name}` needs at least {min} (min_workers)");
    }
    Ok(())
}

/// The two children: scheduler and agent.
struct Pair {
    children: [Child; 2],
    arguments: [Vec<OsString>; 2],
    /// What the first start of the scheduler is told besides.
    first: Option<OsString>,
    local: PathBuf,
}

impl Pair {
    fn new(run: &RunArguments, location: &str, local: &Path) -> Self {
        let own = |role: &str| {
            let log = local.join("logs").join(format!("{role}.jsonl"));
            let words = [role, "--root", location, "--follow-stdin", "--log"];
            let mut arguments: Vec<OsString> = words.map(OsString::from).into();
            arguments.push(log.into());
            arguments
        };
        let mut scheduler = own("scheduler");
        scheduler.push("--until-done".into());
        let mut agent = own("agent");
        agent.extend(["--slots".into(), run.workers.to_string().into()]);
        agent.extend(["--local".into(), local.into()]);
        Pair {
            children: [Child::new(), Child::new()],
            arguments: [scheduler, agent],
            first: run.resume.then(|| "--revive".into()),
            local: local.to_owned(),
        }
    }

    /// Starts what is to run; returns whether the plan is over.
    fn tend(&mut self) -> anyhow::Result<bool> {
        let logs = self.local.join("logs");
        let mut started = false;
        for (index, role) in ROLES.into_iter().enumerate() {
            let child = &mut self.children[index];
            match child.look()? {
                Fate::Lives | Fate::Waits | Fate::Due => {}
                Fate::Left if role == "scheduler" => return Ok(true),
                Fate::GaveUp => bail!("{}", child::last_words(&logs, role)),
                Fate::TooOften => bail!(
                    "the {role} died {QUICK_DEATHS_MAX} times soon after its start; see {}",
                    logs.display()
                ),
                Fate::Left | Fate::Aside => eprintln!("the {role} left; starting it again"),
                Fate::Died(status) => eprintln!("the {role} died ({status}); starting it again"),
            }
            if child.is_due() {
                let mut arguments = self.arguments[index].clone();
                if role == "scheduler" {
                    arguments.extend(self.first.take());
                }
                // Neither computes anything.
                child.start((&logs, role), &arguments, 1, false)?;
                started = true;
            }
        }
        if started {
            self.write_pids()?;
        }
        Ok(false)
    }

    /// `run.pids.json`: who runs under which process id, for people and tests.
    fn write_pids(&self) -> anyhow::Result<()> {
        let pids = ROLES.iter().zip(&self.children).filter_map(|(role, c)| {
            Some(serde_json::json!({"role": role, "pid": c.pid()?, "restarts": c.restarts}))
        });
        let text = Value::Array(pids.collect()).to_string();
        replace(&self.local.join("run.pids.json"), &text)
    }

    fn restarts(&self) -> u32 {
        self.children.iter().map(|child| child.restarts).sum()
    }

    async fn stop(&mut self) {
        child::end_all(self.children.iter_mut(), STOP_GRACE).await;
    }
}

/// Looks at the plan again and again, whoever schedules it.
fn watch(root: Root) -> mpsc::Receiver<PlanStatus> {
    let (looks, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let whereabouts = Whereabouts::Journal(root);
        while !looks.is_closed() {
            if let Ok(mut client) = whereabouts.connect().await {
                while let Ok(status) = client.plan(PlanRequest {}).await {
                    if looks.send(status.into_inner()).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(LOOK_PAUSE).await;
                }
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    });
    receiver
}

/// What was said of each stage.
#[derive(Default)]
struct Told(std::collections::BTreeMap<String, (String, u32, u64, String)>);

impl Told {
    /// Says what is new.
    fn show(&mut self, status: &PlanStatus) {
        for stage in &status.stages {
            let part = (stage.steps_total / LINES_PER_STAGE).max(1);
            let now = (
                stage.state.clone(),
                stage.workers,
                stage.step / part,
                stage.why.clone(),
            );
            if self.0.get(&stage.name) == Some(&now) {
                continue;
            }
            self.0.insert(stage.name.clone(), now);
            let mut text = format!("{}: {}", stage.name, stage.state);
            if stage.workers > 0 {
                text += &format!(", {} workers", stage.workers);
            }
            if stage.steps_total > 0 {
                text += &format!(", step {}/{}", stage.step, stage.steps_total);
            }
            if !stage.why.is_empty() {
                text += &format!(" ({})", stage.why);
            }
            eprintln!("{text}");
        }
    }
}

/// Prints the results: a table on standard error, one JSON line on standard output.
async fn finish(root: &Root, begun: Instant, restarts: u32) -> anyhow::Result<()> {
    let table = root.get(RESULTS_TABLE).await?;
    eprint!("{}", String::from_utf8_lossy(&table));
    let text = root.get(RESULTS_FILE).await?;
    let mut line: Value =
        serde_json::from_slice(&text).with_context(|| format!("{root}/{RESULTS_FILE}"))?;
    line["restarts"] = restarts.into();
    line["seconds"] = begun.elapsed().as_secs_f64().into();
    println!("{line}");
    Ok(())
}
