//! The exchange and the copy of a state under virtual time, on links that a seed delays, cuts,
//! stalls, flips and doubles: the serial bits or an error that blames the right rank, in time, for
//! every seed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};

use crate::contract::{bits, even, requests, scattered, serial};
use crate::exchange::{LinkFuture, PeerLinks, exchange};
use crate::frame::{BoxLink, HEADER_BYTES};
use crate::{CollectiveError, Limits, Reduce, Reduced};

const RUN: u64 = 0xbe1f;
/// Seeds of an ordinary run.
const SEEDS: u64 = 10_000;
const SILENCE: Duration = Duration::from_secs(3);
const START: Duration = Duration::from_secs(20);

fn limits() -> Limits {
    Limits {
        connect_timeout: Duration::from_secs(2),
        silence_timeout: SILENCE,
        start_timeout: START,
        frame_bytes_max: 64,
    }
}

/// What a seed decides, number after number.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        xxhash_rust::xxh3::xxh3_64(&self.0.to_le_bytes()) % bound.max(1)
    }
}

/// What is wrong with one link, after so many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Cut(u64),
    Stall(u64),
    Flip(u64),
    /// The frame that ends here is sent once more: a late duplicate.
    Double(u64),
}

/// Carries bytes one way in bursts of seeded size and delay; what flows back is carried at once.
fn link(seed: u64, delay_ms: u64, fault: Option<Fault>) -> (BoxLink, BoxLink) {
    let (sender, near) = tokio::io::duplex(700);
    let (far, receiver) = tokio::io::duplex(700);
    let (mut from, mut back_to) = tokio::io::split(near);
    let (mut back_from, mut to) = tokio::io::split(far);
    tokio::spawn(async move {
        let _ = tokio::io::copy(&mut back_from, &mut back_to).await;
    });
    tokio::spawn(async move {
        let mut dice = Dice(seed);
        let (mut at, mut burst, mut doubled) = (0u64, vec![0; 512], false);
        let mut sent: Vec<u8> = Vec::new();
        loop {
            let most = 1 + dice.below(burst.len() as u64) as usize;
            let Ok(read @ 1..) = from.read(&mut burst[..most]).await else {
                break;
            };
            sleep(Duration::from_millis(dice.below(delay_ms + 1))).await;
            let mut bytes = burst[..read].to_vec();
            let end = at + read as u64;
            match fault {
                Some(Fault::Flip(n)) if (at..end).contains(&n) => bytes[(n - at) as usize] ^= 4,
                Some(Fault::Cut(n)) if n < end => break,
                Some(Fault::Stall(n)) if n < end => std::future::pending().await,
                _ => {}
            }
            sent.extend_from_slice(&bytes);
            at = end;
            if to.write_all(&bytes).await.is_err() {
                break;
            }
            if let Some(Fault::Double(n)) = fault
                && !doubled
                && let Some(frame) = last_frame(&sent, n)
            {
                doubled = true;
                if to.write_all(&frame).await.is_err() {
                    break;
                }
            }
        }
        // The other direction's half would keep the connection open.
        let _ = to.shutdown().await;
    });
    (Box::new(sender), Box::new(receiver))
}

/// The last frame of `sent`, if it ends at a frame's border behind `n` bytes.
fn last_frame(sent: &[u8], n: u64) -> Option<Vec<u8>> {
    let mut at = 0;
    let mut last = None;
    while let Some(header) = sent.get(at..at + HEADER_BYTES) {
        let size = header[52..56].try_into().ok().map(u32::from_le_bytes)?;
        let end = at + HEADER_BYTES + size as usize;
        if end > sent.len() || header[..4] != *b"BFR1" {
            return None;
        }
        last = Some(sent[at..end].to_vec());
        at = end;
    }
    (at == sent.len() && at as u64 > n).then_some(last)?
}

struct Case {
    requests: Vec<Reduce>,
    lanes: u32,
    len: usize,
    delay_ms: u64,
    /// When each member begins.
    begins_ms: Vec<u64>,
    /// From rank to rank.
    faulty: Option<((usize, usize), Fault)>,
}

fn case(seed: u64) -> Case {
    let mut dice = Dice(seed);
    let lanes = [3, 7, 8, 16][dice.below(4) as usize];
    let members = 2 + dice.below(u64::from(lanes).min(5) - 1) as usize;
    let len = [0, 1, 3, 40, 150][dice.below(5) as usize];
    let nodes = match dice.below(2) {
        0 => even(lanes, members),
        _ => scattered(lanes, members),
    };
    let addr = |m| std::net::SocketAddr::from(([127, 0, 0, 1], 1000 + m as u16));
    let addrs: Vec<_> = (0..members).map(addr).collect();
    let from = dice.below(members as u64) as usize;
    let to = (from + 1 + dice.below(members as u64 - 1) as usize) % members;
    let at = dice.below(1_200);
    let fault = match dice.below(5) {
        0 => None,
        1 => Some(Fault::Cut(at)),
        2 => Some(Fault::Stall(at)),
        3 => Some(Fault::Flip(at)),
        _ => Some(Fault::Double(at)),
    };
    Case {
        requests: requests(lanes, len, &nodes, &addrs),
        lanes,
        len,
        delay_ms: [0, 2, 40][dice.below(3) as usize],
        begins_ms: (0..members).map(|_| dice.below(2_500)).collect(),
        faulty: fault.map(|f| ((from, to), f)),
    }
}

/// Runs a case; gives each member's outcome, and when it came.
async fn outcomes(seed: u64, case: &Case) -> Vec<(Result<Reduced, CollectiveError>, Duration)> {
    let members = case.requests.len();
    let (mut outgoing, mut incoming) = (BTreeMap::new(), BTreeMap::new());
    for from in 0..members {
        for to in (0..members).filter(|to| *to != from) {
            let fault = case.faulty.filter(|(pair, _)| *pair == (from, to));
            let seed = seed ^ (((from * members + to) as u64) << 32);
            let (near, far) = link(seed, case.delay_ms, fault.map(|(_, f)| f));
            outgoing.insert((from, to), near);
            incoming.insert((from, to), far);
        }
    }
    let ready = |link: Option<BoxLink>| -> LinkFuture {
        Box::pin(async move { Ok(link.expect("each link is used once")) })
    };
    let begun = Instant::now();
    let mut tasks = Vec::new();
    for (rank, request) in case.requests.iter().cloned().enumerate() {
        let peers = (0..members).filter(|peer| *peer != rank);
        let links: BTreeMap<usize, PeerLinks> = peers
            .map(|peer| {
                let outgoing = ready(outgoing.remove(&(rank, peer)));
                let incoming = ready(incoming.remove(&(peer, rank)));
                (peer, PeerLinks { outgoing, incoming })
            })
            .collect();
        let wait = Duration::from_millis(case.begins_ms[rank]);
        tasks.push(tokio::spawn(async move {
            sleep(wait).await;
            let ended = exchange(Arc::new(request), RUN, limits(), links).await;
            (ended.map(|(reduced, _)| reduced), begun.elapsed())
        }));
    }
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await.expect("no panic"));
    }
    all
}

/// Whom the receiver behind a fault must blame, if it fails: its sender, and nobody else.
fn check(seed: u64, case: &Case, all: &[(Result<Reduced, CollectiveError>, Duration)]) -> bool {
    let what = || format!("seed {seed}, {:?}", case.faulty);
    let expected = bits(&serial(case.lanes, case.len));
    // All have begun after 2.5 s; then delays, one silence, and the silence of who waits for those.
    let latest = START + SILENCE * 3;
    for (rank, (outcome, at)) in all.iter().enumerate() {
        assert!(*at < latest, "{}: rank {rank} took {at:?}", what());
        match outcome {
            Ok(reduced) => assert_eq!(bits(&reduced.sum), expected, "{}: rank {rank}", what()),
            Err(error) => {
                let Some(((from, to), _)) = case.faulty else {
                    panic!("{}: rank {rank} failed without a fault: {error}", what());
                };
                let corrupt = matches!(error, CollectiveError::Corrupt { .. });
                let unexpected = matches!(error, CollectiveError::Unexpected { .. });
                if corrupt || unexpected {
                    let right = rank == to && error.ranks() == [from as u32];
                    assert!(right, "{}: rank {rank} says {error}", what());
                }
                if matches!(error, CollectiveError::PeerSilent { .. }) {
                    let named = error.ranks()[0] as usize;
                    let pair = [(from, to), (to, from)];
                    assert!(
                        pair.contains(&(named, rank)),
                        "{}: rank {rank} says {error}",
                        what()
                    );
                }
            }
        }
    }
    all.iter().all(|(outcome, _)| outcome.is_ok())
}

fn environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn whatever_the_links_do_the_sum_is_serial_or_the_right_rank_is_blamed() {
    let seeds = environment("BELFRY_SEEDS").unwrap_or(SEEDS);
    let range = match environment("BELFRY_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..seeds,
    };
    let (mut whole, mut failed, mut by) = (0u64, 0u64, BTreeMap::new());
    for seed in range {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let case = case(seed);
        let all = runtime.block_on(async {
            let ended = timeout(START * 10, outcomes(seed, &case)).await;
            ended.unwrap_or_else(|_| panic!("seed {seed}: it hangs: {:?}", case.faulty))
        });
        if check(seed, &case, &all) {
            whole += 1;
        } else {
            failed += 1;
        }
        for error in all.iter().filter_map(|(outcome, _)| outcome.as_ref().err()) {
            let text = format!("{error:?}");
            let name = text.split([' ', '(']).next().unwrap_or_default().to_owned();
            *by.entry(name).or_insert(0u64) += 1;
        }
    }
    println!("{whole} exchanges of the serial bits, {failed} that failed: {by:?}");
    assert!(whole > 0 && (failed > 0 || seeds < SEEDS), "faults fired");
}
