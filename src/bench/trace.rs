//! `belfry bench step --trace`: where a step's time goes, by phase, and a timeline for Perfetto.
//!
//! Phases are `tracing` spans of the model's and of the rehearsed worker. Time belongs to the
//! innermost open phase of its thread; where parts of a step run side by side on the host, the
//! times of all threads add up to more than the step takes.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use belfry_configs::ValidConfig;
use belfry_model::phase::{PHASES, WAITING};
use serde_json::json;
use tracing::{Subscriber, span};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;

use super::step::{StepArguments, title};
use super::table::seconds;
use super::timing::Rounds;
use super::worker::Rehearsal;

/// Spans of the timeline; a step has some hundreds, and a file of this many opens easily.
const EVENTS_MAX: usize = 500_000;

/// A closed span of the timeline.
struct Event {
    name: &'static str,
    /// Which of the threads that ran at the same time.
    track: usize,
    begun: Duration,
    lasted: Duration,
}

/// Times of one phase.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Times {
    spans: u64,
    /// Without the phases inside it.
    own: Duration,
}

#[derive(Default)]
struct Recorded {
    phases: BTreeMap<&'static str, Times>,
    events: Vec<Event>,
    left_out: usize,
    /// Which tracks a living thread has.
    tracks: Vec<bool>,
}

/// Adds up what it sees.
#[derive(Clone)]
struct Recorder {
    recorded: Arc<Mutex<Recorded>>,
    since: Instant,
}

/// An open span of this thread.
struct Open {
    begun: Instant,
    inside: Duration,
}

/// This thread's open spans, and its track while it has any.
#[derive(Default)]
struct Stack {
    open: Vec<Open>,
    track: usize,
}

thread_local! {
    static STACK: RefCell<Stack> = RefCell::default();
}

impl Recorder {
    fn new() -> Self {
        Recorder {
            recorded: Arc::default(),
            since: Instant::now(),
        }
    }

    fn begin(&self) {
        STACK.with_borrow_mut(|stack| {
            if stack.open.is_empty() {
                stack.track = self.take_track();
            }
            stack.open.push(Open {
                begun: Instant::now(),
                inside: Duration::ZERO,
            });
        });
    }

    fn end(&self, name: &'static str) {
        let now = Instant::now();
        STACK.with_borrow_mut(|stack| {
            let Some(open) = stack.open.pop() else { return };
            let lasted = now - open.begun;
            if let Some(outer) = stack.open.last_mut() {
                outer.inside += lasted;
            }
            let event = Event {
                name,
                track: stack.track,
                begun: open.begun.saturating_duration_since(self.since),
                lasted,
            };
            let own = lasted.saturating_sub(open.inside);
            self.record(event, own, stack.open.is_empty());
        });
    }

    fn take_track(&self) -> usize {
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        let tracks = &mut recorded.tracks;
        let free = tracks.iter().position(|taken| !taken);
        let track = free.unwrap_or(tracks.len());
        if track == tracks.len() {
            tracks.push(true);
        }
        tracks[track] = true;
        track
    }

    fn record(&self, event: Event, own: Duration, outermost: bool) {
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        if outermost {
            recorded.tracks[event.track] = false;
        }
        let times = recorded.phases.entry(event.name).or_default();
        times.spans += 1;
        times.own += own;
        if recorded.events.len() < EVENTS_MAX {
            recorded.events.push(event);
        } else {
            recorded.left_out += 1;
        }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Recorder {
    fn on_enter(&self, _: &span::Id, _: Context<'_, S>) {
        self.begin();
    }

    fn on_exit(&self, id: &span::Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            self.end(span.name());
        }
    }
}

/// Runs some steps unseen and as many watched, prints phases, writes the timeline.
pub fn run(arguments: &StepArguments, config: &ValidConfig) -> anyhow::Result<()> {
    let mut worker = Rehearsal::new(config, arguments.lanes)?;
    for _ in 0..arguments.warm_up {
        worker.step()?;
    }
    let unseen = time(&mut worker, arguments.steps)?;
    let recorder = Recorder::new();
    let only = Targets::new().with_target(PHASES, LevelFilter::TRACE);
    let watching = tracing_subscriber::registry().with(recorder.clone().with_filter(only));
    tracing::subscriber::set_global_default(watching).context("someone else records already")?;
    let watched = time(&mut worker, arguments.steps)?;
    let recorded = recorder
        .recorded
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    write(&recorded, &arguments.out)?;
    println!("{}", title("bench step --trace", arguments, config));
    println!(
        "{} steps after {} unmeasured; {} a step when nobody looks, {} with every phase waited for",
        arguments.steps,
        arguments.warm_up,
        seconds(unseen.median()),
        seconds(watched.median())
    );
    print!("{}", table(&recorded.phases, arguments.steps));
    println!(
        "timeline: {}, for https://ui.perfetto.dev",
        arguments.out.display()
    );
    if recorded.left_out > 0 {
        println!(
            "the timeline lacks the last {} spans; fewer --steps hold all",
            recorded.left_out
        );
    }
    let phases = recorded.phases.iter().map(|(name, times)| {
        let own = times.own.as_secs_f64() / f64::from(arguments.steps);
        ((*name).to_owned(), json!(own))
    });
    let phases: serde_json::Map<String, serde_json::Value> = phases.collect();
    println!(
        "{}",
        json!({
            "bench": "trace", "seconds": unseen.median(), "seconds_traced": watched.median(),
            "phase_seconds": phases, "parameters_sha256": worker.parameters_sha256()?,
        })
    );
    Ok(())
}

fn time(worker: &mut Rehearsal, steps: u32) -> anyhow::Result<Rounds> {
    let mut times = Rounds::default();
    for _ in 0..steps {
        let begun = Instant::now();
        worker.step()?;
        times.add(begun.elapsed().as_secs_f64());
    }
    Ok(times)
}

/// Phases by their own time per step. Waiting for other threads is no work and has no share.
fn table(phases: &BTreeMap<&'static str, Times>, steps: u32) -> String {
    let works = |name: &str| name != WAITING;
    let of = phases.iter().filter(|(name, _)| works(name));
    let all: Duration = of.map(|(_, times)| times.own).sum();
    let mut rows: Vec<_> = phases.iter().collect();
    rows.sort_by_key(|(_, times)| std::cmp::Reverse(times.own));
    let mut text = format!(
        "{:<22} {:>11} {:>7} {:>9}\n",
        "phase", "own time", "share", "spans"
    );
    for (name, times) in rows {
        let share = times.own.as_secs_f64() / all.as_secs_f64().max(f64::MIN_POSITIVE);
        let share = match works(name) {
            true => format!("{:.1} %", 100.0 * share),
            false => "-".into(),
        };
        text += &format!(
            "{name:<22} {:>11} {share:>7} {:>9.1}\n",
            seconds(times.own.as_secs_f64() / f64::from(steps)),
            times.spans as f64 / f64::from(steps),
        );
    }
    text
}

/// The timeline in Chrome's trace format: complete events, microseconds.
fn write(recorded: &Recorded, file: &Path) -> anyhow::Result<()> {
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let events = recorded.events.iter().map(|event| {
        json!({
            "name": event.name, "cat": "phase", "ph": "X", "pid": 1, "tid": event.track + 1,
            "ts": micros(event.begun), "dur": micros(event.lasted),
        })
    });
    let events: Vec<_> = events.collect();
    let text = json!({"displayTimeUnit": "ms", "traceEvents": events}).to_string();
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A recorder that watches this thread while `work` runs.
    fn watch(work: impl FnOnce()) -> Recorder {
        let recorder = Recorder::new();
        let watching = tracing_subscriber::registry().with(recorder.clone());
        tracing::subscriber::with_default(watching, work);
        recorder
    }

    #[test]
    fn time_belongs_to_the_innermost_phase() {
        let pause = Duration::from_millis(20);
        let recorder = watch(|| {
            let outer = tracing::trace_span!(target: PHASES, "outer").entered();
            let inner = tracing::trace_span!(target: PHASES, "inner").entered();
            std::thread::sleep(pause);
            drop(inner);
            drop(outer);
        });
        let recorded = recorder.recorded.lock().unwrap();
        let (outer, inner) = (recorded.phases["outer"], recorded.phases["inner"]);
        assert!(inner.own >= pause, "{inner:?}");
        let whole = recorded.events.iter().find(|e| e.name == "outer").unwrap();
        assert!(whole.lasted >= pause);
        assert_eq!(outer.own, whole.lasted - recorded.events[0].lasted);
        assert_eq!(recorded.tracks, [false], "the thread gave its track back");
    }

    #[test]
    fn waiting_has_no_share_and_the_shares_are_of_the_rest() {
        let times = |millis| Times {
            spans: 4,
            own: Duration::from_millis(millis),
        };
        let phases = [("a", times(30)), ("b", times(10)), (WAITING, times(100))];
        let text = table(&phases.into(), 2);
        let row = |name: &str| {
            text.lines()
                .find(|l| l.starts_with(name))
                .unwrap()
                .to_owned()
        };
        assert!(row("a").contains("15.00 ms  75.0 %       2.0"), "{text}");
        assert!(row(WAITING).contains("50.00 ms       -"), "{text}");
    }

    #[test]
    fn a_timeline_is_complete_events() {
        let recorder = watch(|| drop(tracing::trace_span!(target: PHASES, "one").entered()));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("trace.json");
        write(&recorder.recorded.lock().unwrap(), &file).unwrap();
        let read: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let event = &read["traceEvents"][0];
        assert_eq!((&event["name"], &event["ph"]), (&json!("one"), &json!("X")));
        assert!(event["dur"].as_f64().unwrap() >= 0.0);
    }
}
