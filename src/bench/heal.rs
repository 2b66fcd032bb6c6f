//! `belfry bench heal`: a newcomer copies a state from peers of this process over loopback, beside
//! sockets that carry the same bytes and nothing else; the digest that all agree on, beside memcpy;
//! and what the copy costs whoever trains on the same processors.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use belfry_collective::digest::{slice_digests, state_digest};
use belfry_collective::{Endpoint, Limits, StateSource};
use clap::Args;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::reduce::raw_copy;
use super::table::{Report, gigabytes, seconds};
use super::timing::{Rounds, peak_bytes, reset_peak};

/// Parameters and both moments.
const TENSORS: usize = 3;
/// Bytes that a delayed link holds at most: what 10 Gbit/s carries in 50 ms.
const DELAYED_CHUNKS: usize = 256;
const DELAYED_CHUNK_BYTES: usize = 256 << 10;

/// Arguments of `belfry bench heal`.
#[derive(Args)]
pub struct HealArguments {
    /// Parameters in millions; ManagerTower-BASE trains 339. The state is three times as many floats
    /// and is held twice.
    #[arg(long, value_name = "N", default_value_t = 16)]
    millions: usize,
    /// Peers that the newcomer copies from; each number up to this one is measured.
    #[arg(long, value_name = "N", default_value_t = 3)]
    sources: usize,
    /// Rounds of copy and floor.
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: u64,
    /// Milliseconds that everything takes each way, as between data centres.
    #[arg(long, value_name = "N", default_value_t = 0)]
    delay_ms: u64,
}

struct State(Vec<Vec<f32>>);

impl StateSource for State {
    fn step(&self) -> u64 {
        1
    }
    fn tensors(&self) -> usize {
        TENSORS
    }
    fn tensor(&self, index: usize) -> &[f32] {
        &self.0[index]
    }
}

/// Measures and prints.
pub async fn run(arguments: HealArguments) -> anyhow::Result<()> {
    ensure!(arguments.rounds > 0, "--rounds: must be at least 1");
    ensure!(arguments.millions > 0, "--millions: must be at least 1");
    ensure!(arguments.sources > 0, "--sources: must be at least 1");
    let len = arguments.millions * 1_000_000;
    let bytes = (TENSORS * len * 4) as u64;
    let value = |tensor: usize| move |i: usize| (i % 8191) as f32 * 1e-3 + tensor as f32;
    let tensors = (0..TENSORS).map(|t| (0..len).map(value(t)).collect());
    let state = Arc::new(State(tensors.collect()));
    let mut report = Report::new(
        "heal",
        format!(
            "bench heal: a state of {}, loopback TCP, {} ms each way",
            gigabytes(bytes as f64),
            arguments.delay_ms
        ),
    );
    report.note(format!(
        "medians of {} rounds, figure and floor in turn; every slice is verified as it arrives",
        arguments.rounds
    ));
    report.json("state_bytes", bytes);
    let digest = hash(&arguments, &state, bytes, &mut report);
    for sources in 1..=arguments.sources {
        copy(&arguments, (sources, digest), &state, &mut report).await?;
    }
    report.print();
    Ok(())
}

/// The digest of a whole state, and what it costs.
fn hash(arguments: &HealArguments, state: &State, bytes: u64, report: &mut Report) -> u128 {
    let tensors: Vec<&[f32]> = state.0.iter().map(Vec::as_slice).collect();
    let mut copy = vec![1.0f32; tensors[0].len()];
    let (mut hashes, mut copies, mut found) = (Rounds::default(), Rounds::default(), 0);
    for _ in 0..arguments.rounds {
        let begun = Instant::now();
        found = state_digest(1, &slice_digests(&tensors));
        hashes.add(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        for tensor in &tensors {
            copy.copy_from_slice(tensor);
        }
        copies.add(begun.elapsed().as_secs_f64());
        std::hint::black_box(&copy);
    }
    let (time, floor) = (hashes.median(), copies.median());
    report.row(
        "digest of the state",
        format!("{}, {}/s", seconds(time), gigabytes(bytes as f64 / time)),
        format!("{}, memcpy", seconds(floor)),
        time / floor,
    );
    report.json("digest_seconds", time);
    // Parameters and a slice of both moments: what every step's readiness tells of.
    let begun = Instant::now();
    let slice = tensors[0]
        .len()
        .div_ceil(belfry_proto::STATE_SLICES as usize);
    std::hint::black_box(slice_digests(&[
        tensors[0],
        &tensors[1][..slice],
        &tensors[2][..slice],
    ]));
    let step = begun.elapsed().as_secs_f64();
    report.row("digests of a step", seconds(step), "", None);
    report.json("step_digest_seconds", step);
    found
}

async fn copy(
    arguments: &HealArguments,
    (sources, digest): (usize, u128),
    state: &Arc<State>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let len = state.0[0].len();
    let bytes = (TENSORS * len * 4) as u64;
    let (mut endpoints, mut addresses) = (Vec::new(), Vec::new());
    for _ in 0..sources {
        let endpoint = Endpoint::bind(any, 1, Limits::default()).await?;
        endpoint.publish_state(Some(Arc::clone(state) as Arc<dyn StateSource>));
        let address = endpoint.local_addr();
        addresses.push(match arguments.delay_ms {
            0 => address,
            ms => delayed(address, Duration::from_millis(ms)).await?,
        });
        endpoints.push(endpoint);
    }
    let newcomer = Endpoint::bind(any, 1, Limits::default()).await?;
    let (mut copies, mut raws, mut slow) =
        (Rounds::default(), Rounds::default(), Rounds::default());
    let mut peak = 0;
    for _ in 0..arguments.rounds {
        let alone = Trainer::start().for_a_while();
        reset_peak();
        let trainer = Trainer::start();
        let (begun, arrived) = (Instant::now(), AtomicU64::new(0));
        let copied = newcomer
            .copy_state(&addresses, 1, (TENSORS, len), &arrived)
            .await?;
        copies.add(begun.elapsed().as_secs_f64());
        slow.add(alone / trainer.rate());
        peak = peak.max(peak_bytes().unwrap_or_default());
        ensure!(copied.digest == digest, "the copy went wrong");
        drop(copied);
        raws.add(raw_copy(bytes, sources as u32).await?);
    }
    let (time, raw) = (copies.median(), raws.median());
    let rate = |time: f64| gigabytes(bytes as f64 / time) + "/s";
    report.row(
        &format!("copy from {sources}"),
        format!("{}, {}", seconds(time), rate(time)),
        format!("{}, {}, {sources} raw sockets", seconds(raw), rate(raw)),
        time / raw,
    );
    report.row(
        "  beside it a training thread takes",
        format!("{:.2} x its time", slow.median()),
        "1 x, alone",
        slow.median(),
    );
    report.row(
        "  peak memory of source and newcomer",
        gigabytes(peak as f64),
        format!("{}, two states", gigabytes(2.0 * bytes as f64)),
        peak as f64 / (2.0 * bytes as f64),
    );
    report.json(&format!("seconds_from_{sources}"), time);
    report.json(&format!("raw_seconds_{sources}"), raw);
    report.json(&format!("training_slowdown_{sources}"), slow.median());
    report.json(&format!("peak_bytes_{sources}"), peak);
    Ok(())
}

/// A thread that computes as a training step does: out of its caches, without a pause.
struct Trainer {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    begun: Instant,
}

impl Trainer {
    fn start() -> Self {
        let (stop, rounds) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&rounds));
        std::thread::spawn(move || {
            let mut values = vec![1.0f32; 64 << 10];
            while !stopped.load(Ordering::Relaxed) {
                values.iter_mut().for_each(|x| *x = *x * 0.999 + 0.001);
                std::hint::black_box(&values);
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        let begun = Instant::now();
        Trainer {
            stop,
            rounds,
            begun,
        }
    }

    fn rate(self) -> f64 {
        self.stop.store(true, Ordering::Relaxed);
        self.rounds.load(Ordering::Relaxed) as f64 / self.begun.elapsed().as_secs_f64()
    }

    /// Its rate with nothing beside it.
    fn for_a_while(self) -> f64 {
        std::thread::sleep(Duration::from_millis(300));
        self.rate()
    }
}

/// The address of a way to `to` that takes `delay` each way and loses nothing.
async fn delayed(to: SocketAddr, delay: Duration) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(to).await else {
                continue;
            };
            let ends = [&near, &far].map(|end| end.set_nodelay(true));
            if ends.iter().any(Result::is_err) {
                continue;
            }
            let (near_in, near_out) = near.into_split();
            let (far_in, far_out) = far.into_split();
            tokio::spawn(later(near_in, far_out, delay));
            tokio::spawn(later(far_in, near_out, delay));
        }
    });
    Ok(address)
}

async fn later(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    delay: Duration,
) {
    let (queue, mut due) = mpsc::channel::<(tokio::time::Instant, Vec<u8>)>(DELAYED_CHUNKS);
    tokio::spawn(async move {
        while let Some((at, bytes)) = due.recv().await {
            tokio::time::sleep_until(at).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
    let mut chunk = vec![0; DELAYED_CHUNK_BYTES];
    while let Ok(read @ 1..) = from.read(&mut chunk).await {
        let at = tokio::time::Instant::now() + delay;
        if queue.send((at, chunk[..read].to_vec())).await.is_err() {
            return;
        }
    }
}
