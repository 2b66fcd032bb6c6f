//! What the device exchange asks of a device and its links, and nothing more.
//!
//! Two implementations stand behind these traits: CUDA with NCCL, and host memory between threads,
//! on which the same algorithm is tested. Operations are enqueued in order; only `download`,
//! `finish` and opening wait, and all waiting ends when the [`Pulse`] is stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::floats::DeviceFloats;
use crate::transport::Wire;

/// Device memory that a fabric knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Buffer(pub usize);

/// Some floats of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Which memory.
    pub buffer: Buffer,
    /// First float.
    pub start: usize,
    /// Number of floats.
    pub len: usize,
}

/// One message between two members, part of a group that is posted at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// To the member with this place in the links.
    Send {
        /// The receiver.
        to: usize,
        /// What it gets.
        from: Span,
    },
    /// From the member with this place in the links.
    Receive {
        /// The sender.
        from: usize,
        /// Where it goes.
        into: Span,
    },
}

/// Why a fabric could not go on.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// Its pulse was stopped.
    #[error("the exchange was given up")]
    Stopped,
    /// A peer is gone, or the way to it.
    #[error("{0}")]
    Broken(String),
    /// This process's device or its libraries failed.
    #[error("{0}")]
    Device(String),
}

/// Stops a fabric from outside, and shows from outside that it goes on.
#[derive(Debug, Default)]
pub struct Pulse {
    stopped: AtomicBool,
    /// Parts done since the last rest.
    beats: AtomicU64,
}

impl Pulse {
    /// Ends all waiting of the fabric, for good.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// Refuses to go on once stopped.
    ///
    /// # Errors
    /// [`FabricError::Stopped`].
    pub fn check(&self) -> Result<(), FabricError> {
        match self.stopped.load(Ordering::Acquire) {
            true => Err(FabricError::Stopped),
            false => Ok(()),
        }
    }

    /// A part is done.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// Peers may be late from here to the next beat.
    pub fn rest(&self) {
        self.beats.store(0, Ordering::Relaxed);
    }

    /// Parts done since the last rest.
    pub fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }
}

/// A device that is linked with the devices of other members.
pub trait Fabric: Send + 'static {
    /// A place in the device's order of operations.
    type Mark: Send;

    /// Called on the thread that is going to use the fabric, before anything else.
    ///
    /// # Errors
    /// As for all of these: [`FabricError`].
    fn enter(&mut self) -> Result<(), FabricError>;
    /// Memory for `len` floats, of no particular content; what was released is used again.
    fn alloc(&mut self, len: usize) -> Result<Buffer, FabricError>;
    /// Makes floats that lie on this device known. They are only read.
    fn adopt(&mut self, floats: &DeviceFloats) -> Result<Buffer, FabricError>;
    /// Forgets a buffer.
    fn release(&mut self, buffer: Buffer);
    /// An allocated buffer's floats, for use beyond this exchange; none where the host has them.
    fn lend(&mut self, buffer: Buffer) -> Option<DeviceFloats>;
    /// Copies from the host; `from` may change once this returns.
    fn upload(&mut self, from: &[f32], into: Span) -> Result<(), FabricError>;
    /// `into = left + right`, element by element, in f32; `into` may be one of them.
    fn add(&mut self, left: Span, right: Span, into: Span) -> Result<(), FabricError>;
    /// `into = from / by`, correctly rounded; by 1 it copies.
    fn divide(&mut self, from: Span, by: f32, into: Span) -> Result<(), FabricError>;
    /// Posts messages as one group. Messages between two members arrive in their order here.
    fn exchange(&mut self, transfers: &[Transfer]) -> Result<(), FabricError>;
    /// Sums `span` over all members in the library's order, in place.
    fn ring_sum(&mut self, span: Span, wire: Wire) -> Result<(), FabricError>;
    /// Copies `span` from one member to all.
    fn broadcast(&mut self, root: usize, span: Span) -> Result<(), FabricError>;
    /// Everything asked for so far.
    fn mark(&mut self) -> Result<Self::Mark, FabricError>;
    /// Waits for `after`, then copies to the host.
    fn download(
        &mut self,
        after: Self::Mark,
        from: Span,
        into: &mut [f32],
    ) -> Result<(), FabricError>;
    /// Waits for everything asked for so far.
    fn finish(&mut self) -> Result<(), FabricError>;
}

/// Makes fabrics: one per generation and group. A fabric that is dropped is aborted.
pub trait Links: Send + Sync + 'static {
    /// What it makes.
    type Fabric: Fabric;

    /// An id that the members of a group share to find each other.
    ///
    /// # Errors
    /// [`FabricError::Device`].
    fn new_id(&self) -> Result<Vec<u8>, FabricError>;

    /// Joins the group of `members` under `id` at place `rank`, waiting for the others.
    ///
    /// # Errors
    /// [`FabricError`].
    fn open(
        &self,
        id: &[u8],
        rank: usize,
        members: usize,
        pulse: Arc<Pulse>,
    ) -> Result<Self::Fabric, FabricError>;
}
