//! The table: what a fault between store and worker does to the batches. They are the same bits as
//! those read from a folder, or there is an error that names what is wrong.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use belfry_data::{DataError, DataPlane, HostBatch, Quarantine, Split};
use bytes::Bytes;
use shard_tools::ShardError;
use shard_tools::store::{Environment, Root, StoreError};

use crate::dataset;
use crate::fault_proxy::{Fault, FaultProxy, Faults};
use crate::http_server;
use crate::s3_server::{ACCESS_KEY, S3Server, SECRET_KEY};

/// What must come of a fault.
#[derive(Clone, Copy, PartialEq)]
enum Outcome {
    /// The bits of the folder.
    SameBits,
    /// One shard is given up, for this reason.
    GivenUp(&'static str),
    /// Access is denied: no shard's fault.
    Denied,
    /// The store is not there: no shard's fault.
    NoStore,
}

struct Case {
    name: &'static str,
    outcome: Outcome,
    faults: Faults,
    /// Whether the manifest meets them too, once it was read.
    everything: bool,
}

fn case(name: &'static str, outcome: Outcome, fault: fn(u64) -> Fault) -> Case {
    Case {
        name,
        outcome,
        faults: Arc::new(fault),
        everything: false,
    }
}

fn cases() -> Vec<Case> {
    use Fault::*;
    use Outcome::*;
    let down = "503 Service Unavailable";
    vec![
        case("none", SameBits, |_| None),
        case("connections end before an answer, 4 times", SameBits, |n| {
            if n < 4 { Hang } else { None }
        }),
        case("bodies cut after 3 MB, always", SameBits, |_| {
            Cut(3_000_000)
        }),
        case("bodies cut after 10 kB, always", GivenUp(""), |_| {
            Cut(10_000)
        }),
        case("503, 6 times", SameBits, |n| {
            if n < 6 {
                Status("503 Service Unavailable")
            } else {
                None
            }
        }),
        case("503 for every shard, always", GivenUp(down), |_| {
            Status("503 Service Unavailable")
        }),
        case("500, every second request", SameBits, |n| {
            if n % 2 == 0 {
                Status("500 Internal Server Error")
            } else {
                None
            }
        }),
        case("4 MB/s", SameBits, |_| Slow(4_000_000)),
        case("shorter than asked for and said so, twice", SameBits, |n| {
            if n < 2 { Short(1000) } else { None }
        }),
        case(
            "shorter than asked for and said so, always",
            GivenUp("bytes from offset"),
            |_| Short(1000),
        ),
        case("one wrong bit, in 2 answers", SameBits, |n| {
            if n < 2 { Wrong(4711) } else { None }
        }),
        case("one wrong bit, always", GivenUp("sha256 is"), |_| {
            Wrong(4711)
        }),
        case("stalls after 50 kB, twice", SameBits, |n| {
            if n < 2 { Stall(50_000) } else { None }
        }),
        case("404 for every shard", GivenUp("does not exist"), |_| {
            Status("404 Not Found")
        }),
        case("403 for every shard", Denied, |_| Status("403 Forbidden")),
        Case {
            everything: true,
            ..case("503 for everything, once it began", NoStore, |_| {
                Status("503 Service Unavailable")
            })
        },
    ]
}

/// Two steps of all lanes.
fn batches(plane: &DataPlane) -> Result<Vec<HostBatch>, DataError> {
    let steps = (0..2).flat_map(|step| (0..8).map(move |lane| (step, lane)));
    let lanes = steps.map(|(step, lane)| plane.lane_step(step, lane, &Quarantine::new()));
    Ok(lanes.collect::<Result<Vec<_>, _>>()?.concat())
}

fn plane(location: &str, cache: &Path) -> Result<DataPlane, DataError> {
    let house = dataset::house();
    let tokenizer = house.join("data/tokenizer/roberta-base.tokenizer.json");
    let settings = [
        format!("data.train={location}"),
        format!("data.tokenizer={}", tokenizer.display()),
        // A single image by a ranged GET has no hash of its own.
        "data.false_image=window".to_owned(),
    ];
    let config = belfry_configs::load(&house.join("configs/tiny.toml"), &settings);
    DataPlane::open(&config.expect("is valid"), cache, Split::Train)
}

/// Checks that `result` is what the case says, and says it in a few words.
fn judged(
    case: &Case,
    result: Result<Vec<HostBatch>, DataError>,
    expected: &[HostBatch],
) -> String {
    let error = match result {
        // Of training shards: what a quarantine is asked for.
        Err(DataError::Unreadable { source, .. }) => *source,
        Ok(batches) => {
            assert!(
                case.outcome == Outcome::SameBits,
                "{}: has batches",
                case.name
            );
            assert!(batches == expected, "{}: has other bits", case.name);
            return "same bits".into();
        }
        Err(error) => error,
    };
    let text = error.to_string();
    let mut inner = &error;
    if let DataError::GivenUp { source, .. } = inner {
        inner = source;
    }
    let given_up = matches!(error, DataError::GivenUp { .. });
    let store = match inner {
        DataError::Shard(ShardError::Store(store)) => Some(store),
        _ => None,
    };
    match case.outcome {
        Outcome::SameBits => panic!("{}: {text}", case.name),
        Outcome::GivenUp(reason) => {
            assert!(given_up && text.contains(reason), "{}: {text}", case.name);
            assert!(
                text.contains(".tar"),
                "{}: names no shard: {text}",
                case.name
            );
        }
        Outcome::Denied => {
            assert!(
                matches!(store, Some(StoreError::Denied { .. })),
                "{}: {text}",
                case.name
            );
            assert!(!given_up, "{}: {text}", case.name);
        }
        Outcome::NoStore => {
            assert!(
                !given_up && text.contains("manifest.json"),
                "{}: {text}",
                case.name
            );
        }
    }
    let mut short = text.replace('\n', " ");
    short.truncate(
        short
            .char_indices()
            .nth(150)
            .map_or(short.len(), |(at, _)| at),
    );
    short
}

/// Runs all cases against what listens at `upstream`, and prints the table.
fn table(kind: &str, upstream: &str, url: impl Fn(&str) -> String, expected: &[HostBatch]) {
    // One at a time: rows that wait for a shard hold threads that all data planes share.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock();
    let mut table = format!("faults between {kind} and the worker:\n");
    for case in cases() {
        let cache = tempfile::tempdir().expect("a folder");
        let begun = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(!case.everything));
        let (meets, faults) = (Arc::clone(&begun), Arc::clone(&case.faults));
        let faults: Faults = Arc::new(move |n| match meets.load(Ordering::SeqCst) {
            true => faults(n),
            false => Fault::None,
        });
        let is_meant = match case.everything {
            true => |_: &str| true,
            false => |path: &str| path.contains(".tar"),
        };
        let proxy = FaultProxy::start(upstream, is_meant, faults);
        let opened = plane(&url(&proxy.address.to_string()), cache.path()).expect("opens");
        begun.store(true, Ordering::SeqCst);
        let clock = Instant::now();
        let outcome = judged(&case, batches(&opened), expected);
        let (seconds, requests) = (clock.elapsed().as_secs_f64(), &proxy.requests);
        let requests = requests.load(Ordering::SeqCst);
        let name = case.name;
        let _ = writeln!(
            table,
            "{name:45} | {requests:4} GETs, {seconds:5.1} s | {outcome}"
        );
    }
    println!("{table}");
}

/// Patience for tests: what a run waits two minutes for.
const PATIENCE: &str = "read_timeout_s=1&retry_timeout_s=3";

fn expected(dataset: &Path) -> Vec<HostBatch> {
    let cache = tempfile::tempdir().expect("a folder");
    let opened = plane(&dataset.display().to_string(), cache.path()).expect("opens");
    batches(&opened).expect("are made")
}

#[test]
fn every_fault_of_a_web_server_gives_the_same_bits_or_its_name() {
    let folder = tempfile::tempdir().expect("a folder");
    dataset::write(folder.path());
    let server = http_server::serve(folder.path()).to_string();
    let url = |proxy: &str| format!("http://{proxy}/?{PATIENCE}");
    table("a web server", &server, url, &expected(folder.path()));
}

#[test]
fn every_fault_of_an_s3_server_gives_the_same_bits_or_its_name() {
    let Some(server) = S3Server::start() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    dataset::write(folder.path());
    let keys = [
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
        ("AWS_ENDPOINT_URL", server.endpoint()),
    ];
    let root = Root::open_in(&server.url("faults"), &Environment::of(&keys, None));
    let root = root.expect("opens");
    let runtime = tokio::runtime::Runtime::new().expect("starts");
    for entry in std::fs::read_dir(folder.path())
        .expect("is there")
        .flatten()
    {
        let bytes = Bytes::from(std::fs::read(entry.path()).expect("is read"));
        let name = entry.file_name().into_string().expect("is text");
        runtime
            .block_on(root.put_large(&name, bytes))
            .expect("is put");
    }
    let upstream = server.endpoint().trim_start_matches("http://").to_owned();
    let url = |proxy: &str| {
        let endpoint = format!("endpoint=http://{proxy}");
        format!(
            "{}?anonymous=true&{endpoint}&{PATIENCE}",
            server.url("faults")
        )
    };
    table("SeaweedFS", &upstream, url, &expected(folder.path()));
}
