//! The contract of the gathering, on TCP: everybody has every lane's block, whoever brought it, also
//! beside sums of the same generation; and a named error for every way in which a peer can fail.

use std::time::Duration;

use super::*;
use crate::contract::{limits, requests};
use crate::frame::Header;
use crate::{Endpoint, Reaction};

const RUN: u64 = 0xbe1f;
const BLOCK_BYTES: usize = 200;

fn block(lane: u32) -> Bytes {
    (0..BLOCK_BYTES)
        .map(|i| (i as u32 * 7 + lane) as u8)
        .collect()
}

fn all(lanes: u32) -> BTreeMap<u32, Bytes> {
    (0..lanes).map(|lane| (lane, block(lane))).collect()
}

async fn endpoints(members: usize, limits: &Limits) -> Vec<Arc<Endpoint>> {
    let mut endpoints = Vec::new();
    for _ in 0..members {
        let addr = SocketAddr::from(([127, 0, 0, 1], 0));
        endpoints.push(
            Endpoint::bind(addr, RUN, limits.clone())
                .await
                .expect("a port"),
        );
    }
    endpoints
}

/// Requests for members with these lanes.
fn gathers(endpoints: &[Arc<Endpoint>], generation: u64, held: &[&[u32]]) -> Vec<Gather> {
    let members = endpoints.iter().zip(held);
    let members = members.map(|(endpoint, lanes)| GatherMember {
        addr: endpoint.local_addr(),
        lanes: lanes.to_vec(),
    });
    let members: Vec<GatherMember> = members.collect();
    let of = |(rank, lanes): (usize, &&[u32])| Gather {
        generation,
        step: 5,
        lanes: held.iter().map(|l| l.len() as u32).sum(),
        rank,
        members: members.clone(),
        blocks: lanes.iter().map(|lane| (*lane, block(*lane))).collect(),
        block_bytes: BLOCK_BYTES,
    };
    held.iter().enumerate().map(of).collect()
}

async fn run(
    endpoints: &[Arc<Endpoint>],
    requests: Vec<Gather>,
) -> Vec<Result<BTreeMap<u32, Bytes>, CollectiveError>> {
    let running = endpoints.iter().zip(requests).map(|(endpoint, request)| {
        let endpoint = Arc::clone(endpoint);
        tokio::spawn(async move { endpoint.gather(request).await })
    });
    let mut results = Vec::new();
    for one in running.collect::<Vec<_>>() {
        results.push(one.await.expect("no panic"));
    }
    results
}

#[tokio::test]
async fn everybody_has_every_block_whoever_brings_it() {
    let cases: [&[&[u32]]; 4] = [
        &[&[0, 1, 2, 3]],
        &[&[0, 1], &[2, 3]],
        &[&[0, 3], &[], &[1, 2]],
        &[&[4, 2], &[0], &[1, 3, 5], &[]],
    ];
    for held in cases {
        let endpoints = endpoints(held.len(), &limits()).await;
        // Twice in one generation: links are used again.
        for _ in 0..2 {
            let requests = gathers(&endpoints, 1, held);
            let lanes = requests[0].lanes;
            for result in run(&endpoints, requests).await {
                assert_eq!(result.expect("gathered"), all(lanes), "{held:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_sum_of_the_same_generation_follows_on_links_of_its_own() {
    let endpoints = endpoints(2, &limits()).await;
    let addresses: Vec<SocketAddr> = endpoints.iter().map(|e| e.local_addr()).collect();
    let nodes = crate::contract::even(4, 2);
    for _ in 0..3 {
        for result in run(&endpoints, gathers(&endpoints, 1, &[&[0, 1], &[2, 3]])).await {
            assert_eq!(result.expect("gathered"), all(4));
        }
        let sums = requests(4, 100, &nodes, &addresses).into_iter();
        let sums = endpoints.iter().cloned().zip(sums);
        let sums =
            sums.map(|(e, request)| tokio::spawn(async move { e.all_reduce(request).await }));
        for sum in sums.collect::<Vec<_>>() {
            let reduced = sum.await.expect("no panic").expect("summed");
            assert_eq!(reduced.sum, crate::contract::serial(4, 100));
        }
    }
}

#[tokio::test]
async fn a_member_that_dies_or_stays_away_is_named_and_the_generation_is_over() {
    let short = Limits {
        start_timeout: Duration::from_millis(300),
        ..limits()
    };
    let mut endpoints = endpoints(3, &short).await;
    let mut requests = gathers(&endpoints, 1, &[&[0], &[1], &[2]]);
    let again = requests[0].clone();
    requests.pop();
    let dead = endpoints.pop().expect("three");
    drop(dead);
    let results = run(&endpoints, requests).await;
    let blamed = results.into_iter().map(|r| r.expect_err("one is missing"));
    let blamed: Vec<CollectiveError> = blamed.collect();
    assert!(blamed.iter().any(|e| e.ranks() == [2]), "{blamed:?}");
    assert!(
        blamed.iter().all(|e| e.reaction() == Reaction::Rejoin),
        "{blamed:?}"
    );
    let over = endpoints[0].gather(again).await.expect_err("over");
    assert!(
        matches!(over, CollectiveError::GenerationOver { .. }),
        "{over}"
    );
}

#[test]
fn slices_that_do_not_fit_are_refused() {
    let slice = |lane: u32, offset: u64, bytes: usize| {
        let mut header = Header::new(Kind::Block, RUN, 1, 5);
        (header.bucket, header.offset) = (lane, offset);
        let payload = vec![0; bytes];
        Frame { header, payload }
    };
    let mut blocks = BTreeMap::from([(3, Vec::new())]);
    let mut taken = |frame: Frame| take(&mut blocks, &frame, 16);
    taken(slice(3, 0, 8)).expect("the first");
    for (wrong, why) in [
        (slice(4, 0, 8), "does not bring"),
        (slice(3, 0, 8), "holds 8 of 16"),
        (slice(3, 2, 12), "holds 8 of 16"),
        (slice(3, u64::MAX, 4), "holds 8 of 16"),
        (slice(3, 2, 0), "holds 8 of 16"),
    ] {
        let reason = taken(wrong).expect_err("refused");
        assert!(reason.contains(why), "{reason}");
    }
    taken(slice(3, 2, 8)).expect("the rest");
    let mut part = slice(3, 4, 4);
    part.header.kind = Kind::Part;
    assert!(taken(part).is_err());
}

#[test]
fn a_request_that_contradicts_itself_is_refused() {
    let addr = SocketAddr::from(([127, 0, 0, 1], 1));
    let request = Gather {
        generation: 1,
        step: 0,
        lanes: 2,
        rank: 0,
        members: vec![GatherMember {
            addr,
            lanes: vec![0, 1],
        }],
        blocks: all(2),
        block_bytes: BLOCK_BYTES,
    };
    request.check().expect("sound");
    let wrong: [fn(&mut Gather); 5] = [
        |r| r.rank = 1,
        |r| r.lanes = 3,
        |r| r.block_bytes = 6,
        |r| r.block_bytes = 8,
        |r| r.blocks.clear(),
    ];
    for change in wrong {
        let mut request = request.clone();
        change(&mut request);
        let error = request.check().expect_err("refused");
        assert_eq!(error.reaction(), Reaction::Fatal, "{error}");
    }
}
