//! The fabric in host memory, between threads of one process: the algorithm's test bench.
//!
//! Members meet under an id in a [`Hub`]; messages lie in mailboxes. A member whose fabric is
//! dropped is gone, and whoever waits for it hears so, as with a communicator that is aborted.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::fabric::{Buffer, Fabric, FabricError, Links, Pulse, Span, Transfer};
use crate::floats::DeviceFloats;
use crate::transport::Wire;

/// How often a waiting member looks at its pulse.
const LOOK: Duration = Duration::from_millis(5);

/// Where members meet.
#[derive(Default)]
pub struct Hub {
    rooms: Mutex<BTreeMap<Vec<u8>, Room>>,
    news: Condvar,
    ids: Mutex<u64>,
    /// Exchanges after which the member at this place dies, if any.
    pub dies: Mutex<Option<(usize, u64)>>,
}

#[derive(Default)]
struct Room {
    joined: BTreeSet<usize>,
    gone: BTreeSet<usize>,
    mail: BTreeMap<(usize, usize), VecDeque<Vec<f32>>>,
}

/// One member's fabric.
pub struct MemoryFabric {
    hub: Arc<Hub>,
    id: Vec<u8>,
    me: usize,
    members: usize,
    pulse: Arc<Pulse>,
    buffers: BTreeMap<usize, Vec<f32>>,
    next: usize,
    exchanges: u64,
}

/// Makes [`MemoryFabric`]s.
pub struct MemoryLinks(pub Arc<Hub>);

impl Hub {
    fn rooms(&self) -> MutexGuard<'_, BTreeMap<Vec<u8>, Room>> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `look` finds something in the room.
    fn wait<T>(
        &self,
        id: &[u8],
        pulse: &Pulse,
        mut look: impl FnMut(&mut Room) -> Option<Result<T, FabricError>>,
    ) -> Result<T, FabricError> {
        let mut rooms = self.rooms();
        loop {
            pulse.check()?;
            let room = rooms.entry(id.to_vec()).or_default();
            if let Some(found) = look(room) {
                return found;
            }
            let waited = self.news.wait_timeout(rooms, LOOK);
            rooms = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Links for MemoryLinks {
    type Fabric = MemoryFabric;

    fn new_id(&self) -> Result<Vec<u8>, FabricError> {
        let mut ids = self.0.ids.lock().unwrap_or_else(PoisonError::into_inner);
        *ids += 1;
        Ok(ids.to_le_bytes().to_vec())
    }

    fn open(
        &self,
        id: &[u8],
        rank: usize,
        members: usize,
        pulse: Arc<Pulse>,
    ) -> Result<MemoryFabric, FabricError> {
        let twice = !self
            .0
            .rooms()
            .entry(id.to_vec())
            .or_default()
            .joined
            .insert(rank);
        if twice {
            return Err(FabricError::Broken(format!("place {rank} is taken")));
        }
        self.0.news.notify_all();
        self.0.wait(id, &pulse, |room| {
            if !room.gone.is_empty() {
                return Some(Err(FabricError::Broken("a member is gone".into())));
            }
            (room.joined.len() == members).then_some(Ok(()))
        })?;
        Ok(MemoryFabric {
            hub: Arc::clone(&self.0),
            id: id.to_vec(),
            me: rank,
            members,
            pulse,
            buffers: BTreeMap::new(),
            next: 0,
            exchanges: 0,
        })
    }
}

impl Drop for MemoryFabric {
    fn drop(&mut self) {
        self.hub
            .rooms()
            .entry(self.id.clone())
            .or_default()
            .gone
            .insert(self.me);
        self.hub.news.notify_all();
    }
}

impl MemoryFabric {
    fn read(&self, span: Span) -> &[f32] {
        &self.buffers[&span.buffer.0][span.start..span.start + span.len]
    }

    fn write(&mut self, span: Span) -> &mut [f32] {
        let buffer = self.buffers.get_mut(&span.buffer.0).expect("a buffer");
        &mut buffer[span.start..span.start + span.len]
    }

    fn receive(&self, from: usize) -> Result<Vec<f32>, FabricError> {
        let way = (from, self.me);
        self.hub.wait(&self.id, &self.pulse, |room| {
            if let Some(message) = room.mail.entry(way).or_default().pop_front() {
                return Some(Ok(message));
            }
            let gone = room.gone.contains(&from);
            gone.then(|| Err(FabricError::Broken("remote error".into())))
        })
    }

    fn send(&self, to: usize, message: Vec<f32>) {
        let mut rooms = self.hub.rooms();
        let room = rooms.entry(self.id.clone()).or_default();
        room.mail
            .entry((self.me, to))
            .or_default()
            .push_back(message);
        drop(rooms);
        self.hub.news.notify_all();
    }
}

impl Fabric for MemoryFabric {
    type Mark = ();

    fn enter(&mut self) -> Result<(), FabricError> {
        self.pulse.check()
    }

    fn alloc(&mut self, len: usize) -> Result<Buffer, FabricError> {
        self.next += 1;
        // Whoever reads what nobody wrote shall notice.
        self.buffers.insert(self.next, vec![f32::NAN; len]);
        Ok(Buffer(self.next))
    }

    fn adopt(&mut self, floats: &DeviceFloats) -> Result<Buffer, FabricError> {
        let values = floats.owner.to_host().map_err(FabricError::Device)?;
        self.next += 1;
        self.buffers.insert(self.next, values);
        Ok(Buffer(self.next))
    }

    fn release(&mut self, buffer: Buffer) {
        self.buffers.remove(&buffer.0);
    }

    fn lend(&mut self, _: Buffer) -> Option<DeviceFloats> {
        None
    }

    fn upload(&mut self, from: &[f32], into: Span) -> Result<(), FabricError> {
        self.write(into).copy_from_slice(from);
        Ok(())
    }

    fn add(&mut self, left: Span, right: Span, into: Span) -> Result<(), FabricError> {
        let pairs = self.read(left).iter().zip(self.read(right));
        let sum: Vec<f32> = pairs.map(|(l, r)| l + r).collect();
        self.write(into).copy_from_slice(&sum);
        Ok(())
    }

    fn divide(&mut self, from: Span, by: f32, into: Span) -> Result<(), FabricError> {
        let quotient: Vec<f32> = self.read(from).iter().map(|x| x / by).collect();
        self.write(into).copy_from_slice(&quotient);
        Ok(())
    }

    fn exchange(&mut self, transfers: &[Transfer]) -> Result<(), FabricError> {
        let dies = *self.hub.dies.lock().unwrap_or_else(PoisonError::into_inner);
        if dies == Some((self.me, self.exchanges)) {
            return Err(FabricError::Device("this member dies".into()));
        }
        self.exchanges += 1;
        for transfer in transfers {
            if let Transfer::Send { to, from } = transfer {
                self.send(*to, self.read(*from).to_vec());
            }
        }
        for transfer in transfers {
            if let Transfer::Receive { from, into } = transfer {
                let message = self.receive(*from)?;
                assert_eq!(message.len(), into.len, "members agree on lengths");
                self.write(*into).copy_from_slice(&message);
            }
        }
        Ok(())
    }

    fn ring_sum(&mut self, span: Span, wire: Wire) -> Result<(), FabricError> {
        let carried = |x: f32| match wire {
            Wire::F32 => x,
            Wire::Bf16 => bf16(x),
        };
        let mine: Vec<f32> = self.read(span).iter().map(|x| carried(*x)).collect();
        for to in (0..self.members).filter(|to| *to != self.me) {
            self.send(to, mine.clone());
        }
        let mut sum: Option<Vec<f32>> = None;
        for from in 0..self.members {
            let theirs = match from == self.me {
                true => mine.clone(),
                false => self.receive(from)?,
            };
            sum = Some(match sum {
                None => theirs,
                Some(sum) => {
                    let pairs = sum.iter().zip(theirs);
                    pairs.map(|(a, b)| carried(a + b)).collect()
                }
            });
        }
        self.write(span).copy_from_slice(&sum.expect("a member"));
        Ok(())
    }

    fn broadcast(&mut self, root: usize, span: Span) -> Result<(), FabricError> {
        if self.me == root {
            for to in (0..self.members).filter(|to| *to != root) {
                self.send(to, self.read(span).to_vec());
            }
            return Ok(());
        }
        let message = self.receive(root)?;
        self.write(span).copy_from_slice(&message);
        Ok(())
    }

    fn mark(&mut self) -> Result<(), FabricError> {
        Ok(())
    }

    fn download(&mut self, (): (), from: Span, into: &mut [f32]) -> Result<(), FabricError> {
        into.copy_from_slice(self.read(from));
        Ok(())
    }

    fn finish(&mut self) -> Result<(), FabricError> {
        self.pulse.check()
    }
}

/// Rounded to the nearest bf16, ties to even.
pub fn bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}
