//! The device transport: the same sum as over TCP, moved and added by devices.
//!
//! [`DeviceEndpoint`] is the shell: a communicator per generation, a thread that may be stopped,
//! and the TCP endpoint for what devices cannot reach and for telling who is dead. The exchange
//! itself is [`algorithm`], on whatever stands behind [`fabric`]'s traits.

mod algorithm;
#[cfg(feature = "nccl")]
mod cuda;
#[cfg(feature = "nccl")]
mod device;
mod fabric;
#[cfg(any(feature = "nccl", test))]
mod library;

#[cfg(test)]
mod memory;
#[cfg(all(test, feature = "nccl"))]
mod on_stand_ins;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use belfry_proto::LaneRange;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::endpoint::{Endpoint, Limits};
use crate::error::CollectiveError;
use crate::exchange::node_digests;
use crate::floats::Floats;
use crate::plan::{Member, Reduce, Reduced};
use crate::transport::{DeviceLinks, Reducing, SumOrder, Transport, staged};

use algorithm::Group;
#[cfg(feature = "nccl")]
pub use cuda::{CudaFabric, CudaLinks};
pub use fabric::{Buffer, Fabric, FabricError, Links, Pulse, Span, Transfer};

/// Times per longest tolerated silence that a waiting member asks whether its peers still live.
const LOOKS_PER_SILENCE: u32 = 2;
/// Looks in a row that a peer may miss: one may meet a full backlog.
const LOOKS_MISSED_MAX: u32 = 2;

/// A process's end of all exchanges over device links; outlives generations.
pub struct DeviceEndpoint<L: Links> {
    tcp: Arc<Endpoint>,
    links: Arc<L>,
    current: Mutex<Current<L::Fabric>>,
}

/// The newest generation that used device links here.
struct Current<F> {
    generation: u64,
    over: bool,
    pulse: Arc<Pulse>,
    /// Between exchanges.
    fabric: Option<F>,
}

/// Ends a generation unless its exchange ended well.
struct Fence<'a, L: Links> {
    endpoint: &'a DeviceEndpoint<L>,
    generation: u64,
    pulse: Arc<Pulse>,
    ended_well: bool,
}

impl<L: Links> Drop for Fence<'_, L> {
    fn drop(&mut self) {
        if self.ended_well {
            return;
        }
        self.pulse.stop();
        let mut current = self.endpoint.current();
        if current.generation == self.generation {
            current.over = true;
            let fabric = current.fabric.take();
            drop(current);
            // Aborting a communicator may take a while.
            drop(fabric);
        }
    }
}

/// What a phase of the exchange hands back with its fabric.
type Phase<F, T> = Result<(F, T), FabricError>;

impl<L: Links> Transport for DeviceEndpoint<L> {
    fn reduce(self: Arc<Self>, request: Reduce<Floats>, links: Option<DeviceLinks>) -> Reducing {
        match links {
            None => Transport::reduce(Arc::clone(&self.tcp), request, None),
            Some(links) => Box::pin(async move { self.exchange(request, links).await }),
        }
    }

    fn new_id(&self) -> Result<Vec<u8>, CollectiveError> {
        let id = self.links.new_id();
        id.map_err(|e| CollectiveError::NoDeviceLinks(e.to_string()))
    }
}

impl<L: Links> DeviceEndpoint<L> {
    /// Exchanges over `links`, and over `tcp` where they do not reach, within the latter's limits.
    pub fn new(tcp: Arc<Endpoint>, links: L) -> Arc<Self> {
        let current = Current {
            generation: 0,
            over: true,
            pulse: Arc::default(),
            fabric: None,
        };
        Arc::new(DeviceEndpoint {
            tcp,
            links: Arc::new(links),
            current: Mutex::new(current),
        })
    }

    fn current(&self) -> MutexGuard<'_, Current<L::Fabric>> {
        // No code panics while it holds the lock.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn exchange(
        &self,
        request: Reduce<Floats>,
        links: DeviceLinks,
    ) -> Result<Reduced, CollectiveError> {
        request.check()?;
        let group = own_group(&request, &links)?;
        let (pulse, fabric) = self.open(request.generation)?;
        let mut fence = Fence {
            endpoint: self,
            generation: request.generation,
            pulse: Arc::clone(&pulse),
            ended_well: false,
        };
        let request = Arc::new(request);
        let (limits, generation) = (self.tcp.limits(), request.generation);
        let peers: BTreeMap<usize, SocketAddr> = group
            .ranks
            .iter()
            .filter(|r| **r != request.rank)
            .map(|r| (*r, request.members[*r].addr))
            .collect();
        let watched = watch(peers.clone(), limits.clone(), Arc::clone(&pulse));
        let worked = self.work(&request, &links, group, (fabric, pulse));
        let result = tokio::select! {
            worked = worked => worked,
            (ranks, reason) = watched => {
                return Err(CollectiveError::LinksBroke { generation, ranks, reason });
            }
        };
        match result {
            Ok((fabric, reduced)) => {
                fence.ended_well = true;
                self.keep(generation, fabric);
                Ok(reduced)
            }
            Err(Failure::Collective(error)) => Err(error),
            Err(Failure::Fabric(FabricError::Device(reason))) => {
                Err(CollectiveError::Device(reason))
            }
            Err(Failure::Fabric(error)) => {
                // Peers learn at once, before the probe.
                drop(fence);
                let ranks = silent(&peers, &limits).await;
                let reason = error.to_string();
                Err(CollectiveError::LinksBroke {
                    generation,
                    ranks,
                    reason,
                })
            }
        }
    }

    /// Enters a generation; leaves what belongs to an older one.
    #[allow(clippy::type_complexity)]
    fn open(&self, generation: u64) -> Result<(Arc<Pulse>, Option<L::Fabric>), CollectiveError> {
        let mut current = self.current();
        let held = current.generation;
        if generation < held || (generation == held && current.over) {
            return Err(CollectiveError::GenerationOver { generation, held });
        }
        if generation == held {
            return Ok((Arc::clone(&current.pulse), current.fabric.take()));
        }
        current.pulse.stop();
        let fresh = Current {
            generation,
            over: false,
            pulse: Arc::default(),
            fabric: None,
        };
        let old = std::mem::replace(&mut *current, fresh);
        let pulse = Arc::clone(&current.pulse);
        drop(current);
        drop(old);
        Ok((pulse, None))
    }

    fn keep(&self, generation: u64, fabric: Option<L::Fabric>) {
        let mut current = self.current();
        if current.generation == generation && !current.over {
            current.fabric = fabric;
        }
    }

    /// The exchange: flat, or within hosts, between them, and back.
    async fn work(
        &self,
        request: &Arc<Reduce<Floats>>,
        links: &DeviceLinks,
        group: Group,
        (fabric, pulse): (Option<L::Fabric>, Arc<Pulse>),
    ) -> Result<(Option<L::Fabric>, Reduced), Failure> {
        let flat = links.groups.len() == 1;
        let digests = {
            let request = Arc::clone(request);
            tokio::task::spawn_blocking(move || node_digests(&request))
        };
        let opener = Opener {
            links: Arc::clone(&self.links),
            id: links.id.clone(),
            pulse,
            group,
            request: Arc::clone(request),
        };
        let (fabric, mut reduced) = if flat {
            let order = links.order;
            let done = opener.run(fabric, move |fabric, o| match order {
                SumOrder::Tree => algorithm::all_reduce(fabric, &o.request, &o.group, &o.pulse),
                SumOrder::Ring(wire) => algorithm::ring(fabric, &o.request, wire, &o.pulse),
            });
            let (fabric, reduced) = done.await?;
            (Some(fabric), reduced)
        } else if opener.group.ranks.len() == 1 {
            let request = Arc::clone(request);
            let nodes = blocking(move || staged(&request)).await??.partials;
            (
                None,
                self.between_hosts(&opener.request, links, nodes).await?,
            )
        } else {
            self.through_leaders(links, opener, fabric).await?
        };
        reduced.node_digests = blocking_result(digests.await)?;
        // Between hosts leaders own buckets; the others know nothing of them.
        reduced.parts.clear();
        Ok((fabric, reduced))
    }

    /// Adds within the host, lets its leader exchange with the others', and hands the sum around.
    async fn through_leaders(
        &self,
        links: &DeviceLinks,
        opener: Opener<L>,
        fabric: Option<L::Fabric>,
    ) -> Result<(Option<L::Fabric>, Reduced), Failure> {
        let (fabric, nodes) = opener
            .run(fabric, |fabric, o| {
                algorithm::combine_to_leader(fabric, &o.request, &o.group, &o.pulse)
            })
            .await?;
        opener.pulse.rest();
        let mut outside = (0, 0);
        let sum = if opener.group.me == 0 {
            let nodes = nodes.into_iter().map(|(node, sum)| (node, Arc::new(sum)));
            let nodes = nodes.collect();
            let reduced = self.between_hosts(&opener.request, links, nodes).await?;
            outside = (reduced.bytes_sent, reduced.bytes_received);
            Some(reduced.sum)
        } else {
            None
        };
        let done = opener.run(Some(fabric), move |fabric, o| {
            algorithm::broadcast(fabric, &o.request, &o.group, sum, &o.pulse)
        });
        let (fabric, mut reduced) = done.await?;
        reduced.bytes_sent += outside.0;
        reduced.bytes_received += outside.1;
        Ok((Some(fabric), reduced))
    }

    /// The TCP exchange of the groups' leaders.
    async fn between_hosts(
        &self,
        request: &Reduce<Floats>,
        links: &DeviceLinks,
        nodes: BTreeMap<LaneRange, Arc<Vec<f32>>>,
    ) -> Result<Reduced, CollectiveError> {
        let mut hosts: Reduce = request.with(nodes);
        let member = |ranks: &Vec<usize>| Member {
            addr: request.members[ranks[0]].addr,
            nodes: algorithm::group_nodes(request, ranks),
        };
        hosts.members = links.groups.iter().map(member).collect();
        let own = links.groups.iter().position(|g| g.contains(&request.rank));
        hosts.rank = own.unwrap_or(hosts.members.len());
        let leaders: Vec<usize> = links.groups.iter().map(|g| g[0]).collect();
        let reduced = self.tcp.all_reduce(hosts).await;
        reduced.map_err(|error| error.with_ranks(&leaders))
    }
}

/// Why an exchange did not end well.
enum Failure {
    Fabric(FabricError),
    Collective(CollectiveError),
}

impl From<FabricError> for Failure {
    fn from(error: FabricError) -> Self {
        Failure::Fabric(error)
    }
}

impl From<CollectiveError> for Failure {
    fn from(error: CollectiveError) -> Self {
        Failure::Collective(error)
    }
}

fn blocking_result<T>(joined: Result<T, tokio::task::JoinError>) -> Result<T, CollectiveError> {
    joined.map_err(|e| CollectiveError::Internal(e.to_string()))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, CollectiveError> {
    blocking_result(tokio::task::spawn_blocking(work).await)
}

/// What a phase needs on its thread.
struct Opener<L: Links> {
    links: Arc<L>,
    id: Vec<u8>,
    pulse: Arc<Pulse>,
    group: Group,
    request: Arc<Reduce<Floats>>,
}

impl<L: Links> Clone for Opener<L> {
    fn clone(&self) -> Self {
        Opener {
            links: Arc::clone(&self.links),
            id: self.id.clone(),
            pulse: Arc::clone(&self.pulse),
            group: self.group.clone(),
            request: Arc::clone(&self.request),
        }
    }
}

impl<L: Links> Opener<L> {
    /// Runs a phase on a thread that may block, with the generation's fabric, opened if need be.
    async fn run<T: Send + 'static>(
        &self,
        fabric: Option<L::Fabric>,
        phase: impl FnOnce(&mut L::Fabric, &Self) -> Result<T, FabricError> + Send + 'static,
    ) -> Result<(L::Fabric, T), Failure> {
        let opener = self.clone();
        opener.pulse.rest();
        let done: Phase<L::Fabric, T> = blocking(move || {
            let mut fabric = match fabric {
                Some(fabric) => fabric,
                None => opener.links.open(
                    &opener.id,
                    opener.group.me,
                    opener.group.ranks.len(),
                    Arc::clone(&opener.pulse),
                )?,
            };
            fabric.enter()?;
            let done = phase(&mut fabric, &opener)?;
            Ok((fabric, done))
        })
        .await?;
        Ok(done?)
    }
}

/// The group of this member; the groups must be everybody, once.
fn own_group(request: &Reduce<Floats>, links: &DeviceLinks) -> Result<Group, CollectiveError> {
    let bad = |reason: String| CollectiveError::BadNodes(reason);
    let mut all: Vec<usize> = links.groups.iter().flatten().copied().collect();
    all.sort_unstable();
    let ascending = |g: &Vec<usize>| !g.is_empty() && g.is_sorted();
    if all != (0..request.members.len()).collect::<Vec<_>>() || !links.groups.iter().all(ascending)
    {
        let groups = &links.groups;
        return Err(bad(format!(
            "groups {groups:?} are not all ranks, each once"
        )));
    }
    if links.groups.len() > 1 && links.order != SumOrder::Tree {
        return Err(bad("a ring spans one group".into()));
    }
    let own = links.groups.iter().find(|g| g.contains(&request.rank));
    let ranks = own.cloned().unwrap_or_default();
    let me = ranks.iter().position(|r| *r == request.rank).unwrap_or(0);
    Ok(Group { ranks, me })
}

/// Ends when a peer's process is gone, or when peers that had begun do not go on.
async fn watch(
    peers: BTreeMap<usize, SocketAddr>,
    limits: Limits,
    pulse: Arc<Pulse>,
) -> (Vec<usize>, String) {
    let pause = (limits.silence_timeout / LOOKS_PER_SILENCE).max(Duration::from_millis(1));
    let mut missed: BTreeMap<usize, u32> = BTreeMap::new();
    let (mut beats, mut still, mut waited) = (0, 0, Duration::ZERO);
    loop {
        tokio::time::sleep(pause).await;
        waited += pause;
        let gone = silent(&peers, &limits).await;
        missed.retain(|rank, _| gone.contains(rank));
        for rank in &gone {
            *missed.entry(*rank).or_default() += 1;
        }
        let dead = missed.iter().filter(|(_, n)| **n >= LOOKS_MISSED_MAX);
        let dead: Vec<usize> = dead.map(|(rank, _)| *rank).collect();
        if !dead.is_empty() {
            return (dead, "processes are gone".into());
        }
        let now = pulse.beats();
        if now == beats {
            still += 1;
        } else {
            (still, waited) = (0, Duration::ZERO);
        }
        beats = now;
        if beats > 0 && still > LOOKS_PER_SILENCE {
            let seconds = limits.silence_timeout.as_secs_f64();
            return (Vec::new(), format!("nothing moved for {seconds:.1} s"));
        }
        if waited > limits.start_timeout {
            let seconds = limits.start_timeout.as_secs_f64();
            return (Vec::new(), format!("not everybody began in {seconds:.1} s"));
        }
    }
}

/// The peers whose processes do not answer.
async fn silent(peers: &BTreeMap<usize, SocketAddr>, limits: &Limits) -> Vec<usize> {
    let mut looks = JoinSet::new();
    for (rank, addr) in peers.clone() {
        let limit = limits.connect_timeout;
        looks.spawn(async move {
            let answered = timeout(limit, TcpStream::connect(addr)).await;
            (rank, matches!(answered, Ok(Ok(_))))
        });
    }
    let mut gone = Vec::new();
    while let Some(look) = looks.join_next().await {
        if let Ok((rank, false)) = look {
            gone.push(rank);
        }
    }
    gone.sort_unstable();
    gone
}
