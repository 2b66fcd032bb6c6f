//! Throughput of the all-reduce over loopback TCP, as a ratio to a raw socket copy of the same
//! number of bytes in the same run. Arguments: members, millions of floats.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use belfry_collective::{Endpoint, Limits, Member, Reduce};
use belfry_proto::lanes::{cut, maximal_nodes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

type AnyError = Box<dyn std::error::Error + Send + Sync>;

const LANES: u32 = 64;
const ROUNDS: u64 = 5;

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    let mut args = std::env::args().skip(1);
    let members: usize = args.next().map_or(Ok(2), |a| a.parse())?;
    let len = args.next().map_or(Ok(16), |a| a.parse::<usize>())? * 1_000_000;
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut endpoints = Vec::new();
    for _ in 0..members {
        endpoints.push(Endpoint::bind(any, 1, Limits::default()).await?);
    }
    let ranges = cut(LANES, &vec![1.0; members], 4).into_iter();
    let described: Vec<Member> = ranges
        .zip(&endpoints)
        .map(|(range, endpoint)| Member {
            addr: endpoint.local_addr(),
            nodes: maximal_nodes(LANES, &range.collect()),
        })
        .collect();
    let (mut bytes, mut seconds) = (0, f64::INFINITY);
    let mut partials: Vec<BTreeMap<_, _>> = Vec::new();
    for member in &described {
        let nodes = member.nodes.iter();
        partials.push(
            nodes
                .map(|n| (*n, Arc::new(vec![n.start as f32; len])))
                .collect(),
        );
    }
    for step in 0..ROUNDS {
        let began = Instant::now();
        let mut tasks = Vec::new();
        for (rank, endpoint) in endpoints.iter().enumerate() {
            let (endpoint, partials) = (Arc::clone(endpoint), partials[rank].clone());
            let request = Reduce {
                generation: 1,
                step,
                lanes: LANES,
                rank,
                members: described.clone(),
                partials,
                len,
                divide_by: LANES,
                bucket_len: 1 << 20,
            };
            tasks.push(tokio::spawn(
                async move { endpoint.all_reduce(request).await },
            ));
        }
        bytes = 0;
        for task in tasks {
            bytes += task.await??.bytes_sent;
        }
        seconds = seconds.min(began.elapsed().as_secs_f64());
    }
    let mut raw = f64::INFINITY;
    for _ in 0..ROUNDS {
        raw = raw.min(raw_copy(bytes, members).await?);
    }
    let gigabytes = bytes as f64 / 1e9;
    println!(
        "{members} members, {len} floats, {gigabytes:.3} GB on the wire: all-reduce {:.2} GB/s, \
         raw copy {:.2} GB/s, ratio {:.2}",
        gigabytes / seconds,
        gigabytes / raw,
        raw / seconds
    );
    Ok(())
}

/// Seconds to move `bytes` over one socket per member, without looking at them.
async fn raw_copy(bytes: u64, members: usize) -> Result<f64, AnyError> {
    let began = Instant::now();
    let mut tasks = Vec::new();
    for _ in 0..members {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let share = bytes / members as u64;
        tasks.push(tokio::spawn(async move {
            let mut stream = TcpStream::connect(addr).await?;
            let chunk = vec![0; 256 << 10];
            let mut left = share as usize;
            while left > 0 {
                let now = left.min(chunk.len());
                stream.write_all(&chunk[..now]).await?;
                left -= now;
            }
            Ok::<_, std::io::Error>(())
        }));
        tasks.push(tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await?;
            let mut chunk = vec![0; 256 << 10];
            while stream.read(&mut chunk).await? > 0 {}
            Ok(())
        }));
    }
    for task in tasks {
        task.await??;
    }
    Ok(began.elapsed().as_secs_f64())
}
