//! A plan: stages, each a run or an evaluation, with what they come after and how many workers they
//! need. [`load`] reads the file with all run files that it names and refuses what cannot work.

mod file;
mod stage;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub use file::{Head, Kind, PlanFile, StageEntry, Target, is_plan, read};
pub use stage::{Plan, Stage, Work};

use crate::figures;
use crate::layers::{ConfigError, load as load_run};
use crate::validate::{ValidConfig, refuse};

/// Stages of a plan, repetitions counted: a scheduler walks them all at every event.
pub const STAGES_MAX: usize = 256;
/// Characters of a stage's name: it is a folder's too.
const NAME_MAX: usize = 64;
/// Repetitions of one stage.
const SEEDS_MAX: usize = 32;
/// More tries of what fails every time are of no use.
const RETRIES_MAX: u32 = 100;

/// Reads the plan at `path` and the run files that it names, with `settings` over each of them.
///
/// # Errors
/// [`ConfigError`], naming the file, the stage and the key.
pub fn load(path: &Path, settings: &[String]) -> Result<Plan, ConfigError> {
    let folder = path.parent().unwrap_or(Path::new(""));
    assemble(&read(path)?, |entry, file, set| {
        let set: Vec<String> = set.iter().chain(settings).cloned().collect();
        load_run(&folder.join(file), &set).map_err(|e| within(&entry.name, "config", e))
    })
}

/// A plan of one stage: the run file at `path`, so that a run can be submitted too.
///
/// # Errors
/// [`ConfigError`], naming the file and the key.
pub fn of_run(path: &Path, settings: &[String]) -> Result<Plan, ConfigError> {
    let config = load_run(path, settings)?;
    let entry = StageEntry {
        name: config.run.name.clone(),
        kind: Kind::Train,
        config: Some(path.into()),
        init_from: None,
        seeds: Vec::new(),
        of: None,
        data: None,
        best: None,
        after: Vec::new(),
        min_workers: None,
        preferred_workers: None,
        priority: 0,
        retries: 2,
        set: Vec::new(),
        results: Vec::new(),
    };
    let file = PlanFile {
        plan: Head {
            name: config.run.name.clone(),
        },
        stage: vec![entry],
    };
    assemble(&file, |_, _, _| Ok(config.clone()))
}

fn within(stage: &str, key: &str, error: ConfigError) -> ConfigError {
    refuse(&format!("stage `{stage}`, {key}"), error.to_string())
}

fn key(entry: &StageEntry, key: &str) -> String {
    format!("stage `{}`, {key}", entry.name)
}

/// Checks the file and makes every stage of it, once per seed.
fn assemble(
    file: &PlanFile,
    run: impl Fn(&StageEntry, &Path, &[String]) -> Result<ValidConfig, ConfigError>,
) -> Result<Plan, ConfigError> {
    check_name("plan.name", &file.plan.name)?;
    if file.stage.is_empty() {
        return Err(refuse("stage", "a plan has at least one [[stage]]"));
    }
    let mut entries: BTreeMap<&str, &StageEntry> = BTreeMap::new();
    for entry in &file.stage {
        check_name("stage.name", &entry.name)?;
        if entries.insert(&entry.name, entry).is_some() {
            let why = format!(
                "two stages are called `{}`; each needs its own name",
                entry.name
            );
            return Err(refuse("stage.name", why));
        }
    }
    for entry in &file.stage {
        check_keys(entry)?;
        check_links(entry, &entries)?;
    }
    check_cycles(&entries)?;
    for entry in &file.stage {
        check_figures(entry, &entries, &run)?;
    }
    let names = |group: &str| repetitions(group, &entries);
    let mut stages = Vec::new();
    for entry in &file.stage {
        for (name, seed) in names(&entry.name) {
            stages.push(stage(entry, (name, seed), &names, &run)?);
        }
    }
    if stages.len() > STAGES_MAX {
        let why = format!(
            "{} stages with all seeds; at most {STAGES_MAX} can be",
            stages.len()
        );
        return Err(refuse("stage", why));
    }
    let own: BTreeSet<&str> = stages.iter().map(|s| s.name.as_str()).collect();
    if own.len() < stages.len() {
        let why = "a stage is called as a repetition of another one is (NAME-seedN); rename it";
        return Err(refuse("stage.name", why));
    }
    Ok(Plan {
        name: file.plan.name.clone(),
        stages,
    })
}

fn check_name(key: &str, name: &str) -> Result<(), ConfigError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(plain) {
        let why =
            format!("`{name}` is no name: 1 to {NAME_MAX} letters, digits, `-` and `_` make one");
        return Err(refuse(key, why));
    }
    Ok(())
}

/// Keys that belong to the stage's kind are there, and no others.
fn check_keys(entry: &StageEntry) -> Result<(), ConfigError> {
    let (kind, needed, foreign) = match entry.kind {
        Kind::Train => (
            "trains",
            ("config", entry.config.is_some()),
            [
                ("of", entry.of.is_some()),
                ("data", entry.data.is_some()),
                ("best", entry.best.is_some()),
            ],
        ),
        Kind::Eval => (
            "evaluates",
            ("of", entry.of.is_some()),
            [
                ("config", entry.config.is_some()),
                ("init_from", entry.init_from.is_some()),
                ("seeds", !entry.seeds.is_empty()),
            ],
        ),
    };
    if !needed.1 {
        return Err(refuse(
            &key(entry, needed.0),
            format!("is missing: the stage {kind}"),
        ));
    }
    if let Some((name, _)) = foreign.iter().find(|(_, there)| *there) {
        let why = format!("has no meaning here: the stage {kind}");
        return Err(refuse(&key(entry, name), why));
    }
    let workers = [
        ("min_workers", entry.min_workers),
        ("preferred_workers", entry.preferred_workers),
    ];
    for (name, workers) in workers {
        if entry.kind == Kind::Eval && workers.is_some_and(|w| w != 1) {
            return Err(refuse(&key(entry, name), "an evaluation takes one worker"));
        }
    }
    if entry.retries > RETRIES_MAX {
        let why = format!("{} are more than {RETRIES_MAX}", entry.retries);
        return Err(refuse(&key(entry, "retries"), why));
    }
    let distinct: BTreeSet<u64> = entry.seeds.iter().copied().collect();
    if entry.seeds.len() > SEEDS_MAX || distinct.len() < entry.seeds.len() {
        let why = format!("at most {SEEDS_MAX} seeds, each once");
        return Err(refuse(&key(entry, "seeds"), why));
    }
    for target in &entry.results {
        let numbers = [Some(target.scale), target.paper];
        let good = numbers.iter().flatten().all(|n| n.is_finite()) && target.scale > 0.0;
        if target.metric.is_empty() || target.name.is_empty() || !good {
            let why = "each has a `metric`, a `name` and finite numbers, `scale` above 0";
            return Err(refuse(&key(entry, "results"), why));
        }
    }
    Ok(())
}

/// Names of the stages that an entry comes after, each with the key that says so.
fn links(entry: &StageEntry) -> impl Iterator<Item = (&'static str, &str)> {
    let after = entry.after.iter().map(|name| ("after", name.as_str()));
    let init = entry.init_from.iter().map(|n| ("init_from", n.as_str()));
    let of = entry.of.iter().map(|name| ("of", name.as_str()));
    after.chain(init).chain(of)
}

fn check_links(
    entry: &StageEntry,
    entries: &BTreeMap<&str, &StageEntry>,
) -> Result<(), ConfigError> {
    for (name, link) in links(entry) {
        let Some(other) = entries.get(link) else {
            let all: Vec<&str> = entries.keys().copied().collect();
            let why = format!("no stage is called `{link}`; there are {}", all.join(", "));
            return Err(refuse(&key(entry, name), why));
        };
        if name != "after" && other.kind != Kind::Train {
            let why = format!("`{link}` trains nothing: it evaluates");
            return Err(refuse(&key(entry, name), why));
        }
        if name == "init_from" && other.seeds.len() > 1 {
            let why = format!(
                "`{link}` is repeated with {} seeds, and a run begins with one; give it one seed, or \
                 a stage of its own",
                other.seeds.len()
            );
            return Err(refuse(&key(entry, name), why));
        }
    }
    Ok(())
}

/// What is reported, and what a checkpoint is chosen by, are figures of the task that is trained.
fn check_figures(
    entry: &StageEntry,
    entries: &BTreeMap<&str, &StageEntry>,
    run: &impl Fn(&StageEntry, &Path, &[String]) -> Result<ValidConfig, ConfigError>,
) -> Result<(), ConfigError> {
    let trained = entry.of.as_ref().map_or(entry, |of| entries[of.as_str()]);
    let named = entry.best.iter().map(|best| ("best", best));
    let reported = entry.results.iter().map(|t| ("results", &t.metric));
    let mut named = named.chain(reported).peekable();
    let (Some(_), Some(file)) = (named.peek(), &trained.config) else {
        return Ok(());
    };
    let task = run(trained, file, &trained.set)?.model.task;
    named.try_for_each(|(name, figure)| figures::check(&key(entry, name), task, figure))
}

/// Takes away what comes after nothing that is left, until nothing can be taken.
fn check_cycles(entries: &BTreeMap<&str, &StageEntry>) -> Result<(), ConfigError> {
    let mut left: BTreeSet<&str> = entries.keys().copied().collect();
    loop {
        let free = |name: &&str| links(entries[*name]).all(|(_, link)| !left.contains(link));
        let free: Vec<&str> = left.iter().copied().filter(free).collect();
        if free.is_empty() {
            break;
        }
        for name in free {
            left.remove(name);
        }
    }
    let Some(first) = left.first() else {
        return Ok(());
    };
    let all: Vec<&str> = left.iter().copied().collect();
    let why = format!(
        "none of {} can begin: they come after each other",
        all.join(", ")
    );
    Err(refuse(&key(entries[first], "after"), why))
}

/// The stages that an entry becomes: name and seed.
fn repetitions(group: &str, entries: &BTreeMap<&str, &StageEntry>) -> Vec<(String, Option<u64>)> {
    let entry = entries[group];
    let trained = entry.of.as_ref().map_or(entry, |of| entries[of.as_str()]);
    match trained.seeds.as_slice() {
        [] => vec![(group.into(), None)],
        [seed] => vec![(group.into(), Some(*seed))],
        seeds => {
            let named = seeds.iter().map(|s| (format!("{group}-seed{s}"), Some(*s)));
            named.collect()
        }
    }
}

/// One repetition of an entry.
fn stage(
    entry: &StageEntry,
    (name, seed): (String, Option<u64>),
    names: &impl Fn(&str) -> Vec<(String, Option<u64>)>,
    run: &impl Fn(&StageEntry, &Path, &[String]) -> Result<ValidConfig, ConfigError>,
) -> Result<Stage, ConfigError> {
    // Of the same seed where the other one is repeated as well.
    let twin = |group: &str| {
        let all = names(group);
        let same = all.iter().find(|(_, s)| *s == seed).or(all.first());
        same.map_or(group.to_owned(), |(name, _)| name.clone())
    };
    let mut after: Vec<String> = entry
        .init_from
        .iter()
        .chain(&entry.of)
        .map(|n| twin(n))
        .collect();
    for (other, _) in entry.after.iter().flat_map(|group| names(group)) {
        if !after.contains(&other) {
            after.push(other);
        }
    }
    let (work, least, most) = match (&entry.config, &entry.of) {
        (Some(file), _) => {
            let seed = seed.map(|seed| format!("run.seed={seed}"));
            let set: Vec<String> = entry.set.iter().cloned().chain(seed).collect();
            let config = run(entry, file, &set)?;
            let work = Work::Train {
                run: config.to_toml(),
                init_from: entry.init_from.clone(),
            };
            let most = match config.cluster.max_workers {
                0 => config.batch.lanes,
                max => max.min(config.batch.lanes),
            };
            (work, config.cluster.min_workers.max(1), most)
        }
        (None, of) => {
            let work = Work::Eval {
                of: twin(of.as_deref().unwrap_or_default()),
                data: entry.data.clone(),
                best: entry.best.clone(),
                set: entry.set.clone(),
            };
            (work, 1, 1)
        }
    };
    let (min_workers, preferred_workers) = workers(entry, least, most)?;
    Ok(Stage {
        name,
        group: entry.name.clone(),
        work,
        after,
        min_workers,
        preferred_workers,
        priority: entry.priority,
        retries: entry.retries,
        results: entry.results.clone(),
    })
}

/// Minimum and preferred workers of a run that needs `least` and has work for `most`.
fn workers(entry: &StageEntry, least: u32, most: u32) -> Result<(u32, u32), ConfigError> {
    let min = entry.min_workers.unwrap_or(least);
    let preferred = entry.preferred_workers.unwrap_or(most.max(min));
    if min < least {
        let why = format!("{min} are fewer than the run's cluster.min_workers ({least})");
        return Err(refuse(&key(entry, "min_workers"), why));
    }
    if min > preferred {
        let why = format!("{min} are more than preferred_workers ({preferred})");
        return Err(refuse(&key(entry, "min_workers"), why));
    }
    if preferred > most {
        let why = format!("the run has work for {most} workers (batch.lanes, cluster.max_workers)");
        return Err(refuse(&key(entry, "preferred_workers"), why));
    }
    Ok((min, preferred))
}

#[cfg(test)]
mod tests;
