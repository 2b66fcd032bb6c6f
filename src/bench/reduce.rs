//! `belfry bench reduce`: the all-reduce between endpoints of this process over loopback, beside
//! sockets that carry the same bytes and nothing else; and a gradient's way to the device and back,
//! beside memcpy.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use belfry_collective::{Endpoint, Limits, Member, Reduce};
use belfry_model::floor::{Staging, staging};
use belfry_model::on_host;
use belfry_proto::LaneRange;
use belfry_proto::lanes::{cut, maximal_nodes};
use belfry_worker::open_device;
use clap::Args;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::table::{Report, gigabytes, seconds};
use super::timing::Rounds;

/// Tree nodes of a worker, as `cluster.nodes_per_worker_max` has it.
const NODES_MAX: u32 = 4;
/// Floats of a bucket, as in a run.
const BUCKET_LEN: usize = 1 << 20;
/// Bytes of a raw write.
const CHUNK_BYTES: usize = 256 << 10;

/// Arguments of `belfry bench reduce`.
#[derive(Args)]
pub struct ReduceArguments {
    /// Workers that sum.
    #[arg(long, value_name = "N", default_value_t = 2)]
    workers: u32,
    /// Floats of a gradient in millions; ManagerTower-BASE has 378.
    #[arg(long, value_name = "N", default_value_t = 16)]
    millions: usize,
    /// Lanes of the tree.
    #[arg(long, value_name = "N", default_value_t = 64)]
    lanes: u32,
    /// Rounds of all-reduce, raw copy and staging.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: u64,
    /// Whose staging is measured: cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// Measures and prints.
pub async fn run(arguments: ReduceArguments) -> anyhow::Result<()> {
    ensure!(arguments.rounds > 0, "--rounds: must be at least 1");
    ensure!(arguments.millions > 0, "--millions: must be at least 1");
    let (workers, lanes) = (arguments.workers, arguments.lanes);
    ensure!(
        (1..=lanes).contains(&workers),
        "--workers {workers}: between 1 and {lanes}, the lanes of --lanes"
    );
    let device = open_device(&arguments.device)?;
    let len = arguments.millions * 1_000_000;
    let mut group = Group::bind(workers, lanes, len).await?;
    let (mut reduces, mut raws) = (Rounds::default(), Rounds::default());
    let (mut up, mut down, mut copies) = Default::default();
    // Connections are made and memory is touched for the first time.
    let mut bytes = group.reduce().await?.1;
    for _ in 0..arguments.rounds {
        let (took, sent) = group.reduce().await?;
        bytes = sent;
        reduces.add(took);
        if workers > 1 {
            raws.add(raw_copy(bytes, workers).await?);
        }
        let moved = Arc::clone(&group.any);
        let device = device.clone();
        let (staged, copied) =
            tokio::task::spawn_blocking(move || stage(&device, &moved)).await??;
        Rounds::add(&mut up, staged.to_device);
        Rounds::add(&mut down, staged.to_host);
        Rounds::add(&mut copies, copied);
    }
    let mut report = Report::new(
        "reduce",
        format!("bench reduce: {workers} workers, {lanes} lanes, {len} floats, loopback TCP"),
    );
    report.note(format!(
        "medians of {} rounds, figure and floor in turn; one unmeasured before them",
        arguments.rounds
    ));
    let time = reduces.median();
    report.json("workers", workers);
    report.json("floats", len as u64);
    report.json("wire_bytes", bytes);
    report.json("seconds", time);
    if workers > 1 {
        let raw = raws.median();
        let rate = |time: f64| gigabytes(bytes as f64 / time) + "/s";
        report.row(
            "all-reduce",
            seconds(time),
            format!("{}, raw sockets", seconds(raw)),
            time / raw,
        );
        report.row(
            "bytes on the wire",
            rate(time),
            format!("{}, raw sockets", rate(raw)),
            raw / time,
        );
        report.json("raw_seconds", raw);
    } else {
        report.row(
            "all-reduce",
            seconds(time),
            "alone: nothing on the wire",
            None,
        );
    }
    let memcpy = copies.median();
    let floor = || format!("{}/s, memcpy", gigabytes(memcpy));
    if on_host(&device) {
        report.row("staging", "none: the host's memory".into(), floor(), None);
    } else {
        for (what, key, rate) in [
            ("host to device", "to_device_bytes_per_second", up.median()),
            ("device to host", "to_host_bytes_per_second", down.median()),
        ] {
            let what = format!("{what}, {}", arguments.device);
            report.row(&what, gigabytes(rate) + "/s", floor(), rate / memcpy);
            report.json(key, rate);
        }
    }
    report.json("memcpy_bytes_per_second", memcpy);
    report.print();
    Ok(())
}

/// Bytes per second to the device and back, and of a copy in memory.
fn stage(device: &belfry_model::Device, values: &[f32]) -> anyhow::Result<(Staging, f64)> {
    let staged = staging(device, values)?;
    let mut copy = vec![1.0f32; values.len()];
    let begun = Instant::now();
    copy.copy_from_slice(values);
    let took = begun.elapsed().as_secs_f64();
    ensure!(
        std::hint::black_box(&copy).last() == values.last(),
        "a copy went wrong"
    );
    Ok((staged, size_of_val(values) as f64 / took))
}

/// Members of one sum, all in this process.
struct Group {
    endpoints: Vec<Arc<Endpoint>>,
    members: Vec<Member>,
    partials: Vec<BTreeMap<LaneRange, Arc<Vec<f32>>>>,
    /// One of the partials.
    any: Arc<Vec<f32>>,
    lanes: u32,
    len: usize,
    step: u64,
}

impl Group {
    async fn bind(workers: u32, lanes: u32, len: usize) -> anyhow::Result<Self> {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut endpoints = Vec::new();
        for _ in 0..workers {
            endpoints.push(Endpoint::bind(address, 1, Limits::default()).await?);
        }
        let ranges = cut(lanes, &vec![1.0; workers as usize], NODES_MAX);
        let members = ranges
            .into_iter()
            .zip(&endpoints)
            .map(|(range, endpoint)| Member {
                addr: endpoint.local_addr(),
                nodes: maximal_nodes(lanes, &range.collect()),
            });
        let members: Vec<Member> = members.collect();
        let partial = |node: &LaneRange| (*node, Arc::new(vec![node.start as f32 + 0.5; len]));
        let partials = members
            .iter()
            .map(|m| m.nodes.iter().map(partial).collect());
        let partials: Vec<BTreeMap<_, _>> = partials.collect();
        let first = partials.first().and_then(|nodes| nodes.values().next());
        let any = Arc::clone(first.context("the first worker has no lane")?);
        Ok(Group {
            endpoints,
            members,
            partials,
            any,
            lanes,
            len,
            step: 0,
        })
    }

    /// Seconds until all have the sum, and bytes sent.
    async fn reduce(&mut self) -> anyhow::Result<(f64, u64)> {
        let begun = Instant::now();
        let mut tasks = Vec::new();
        for (rank, endpoint) in self.endpoints.iter().enumerate() {
            let request = Reduce {
                generation: 1,
                step: self.step,
                lanes: self.lanes,
                rank,
                members: self.members.clone(),
                partials: self.partials[rank].clone(),
                len: self.len,
                divide_by: self.lanes,
                bucket_len: BUCKET_LEN,
            };
            let endpoint = Arc::clone(endpoint);
            tasks.push(tokio::spawn(
                async move { endpoint.all_reduce(request).await },
            ));
        }
        self.step += 1;
        let (mut sent, mut digest) = (0, None);
        for task in tasks {
            let reduced = task.await??;
            sent += reduced.bytes_sent;
            let first = *digest.get_or_insert(reduced.digest);
            ensure!(first == reduced.digest, "two workers have different sums");
        }
        Ok((begun.elapsed().as_secs_f64(), sent))
    }
}

/// Seconds to move `bytes` over one socket per worker, without looking at them.
pub(super) async fn raw_copy(bytes: u64, workers: u32) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let mut tasks = Vec::new();
    for _ in 0..workers {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let share = (bytes / u64::from(workers)) as usize;
        tasks.push(tokio::spawn(async move {
            let mut stream = TcpStream::connect(address).await?;
            let chunk = vec![0; CHUNK_BYTES];
            let mut left = share;
            while left > 0 {
                let now = left.min(chunk.len());
                stream.write_all(&chunk[..now]).await?;
                left -= now;
            }
            Ok::<_, std::io::Error>(())
        }));
        tasks.push(tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await?;
            let mut chunk = vec![0; CHUNK_BYTES];
            while stream.read(&mut chunk).await? > 0 {}
            Ok(())
        }));
    }
    for task in tasks {
        task.await??;
    }
    Ok(begun.elapsed().as_secs_f64())
}
