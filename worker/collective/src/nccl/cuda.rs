//! The fabric of GPUs: NCCL between them, the driver on each.
//!
//! Communicators are non-blocking, so that a member that never comes, or dies midway, cannot hold
//! this one: every wait looks at the pulse and at the communicator's own state, and whoever drops
//! the fabric aborts it. All operations go to one stream, copies to the host to another.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_int, c_void};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::nccl::sys;

use super::device::{Context, Event, Kernels, Memory, Pinned, Stream, failed, wait};
use super::fabric::{Buffer, Fabric, FabricError, Links, Pulse, Span, Transfer};
use super::library::{NCCL, missing};
use crate::floats::{DeviceFloats, DeviceOwner};
use crate::transport::Wire;

/// Floats of one pinned slot: 4 MiB, of which there are two each way.
const SLOT_FLOATS: usize = 1 << 20;
/// The oldest NCCL with non-blocking communicators.
const VERSION_MIN: c_int = 2_14_00;
/// What NCCL wants to see in a configuration.
const CONFIG_MAGIC: u32 = 0xcafe_beef;

/// The part of a communicator's configuration that every NCCL from 2.14 on has; what newer ones
/// added takes their defaults, because the version says that it is not there.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

/// Opens fabrics on one GPU.
pub struct CudaLinks {
    context: Arc<Context>,
    version: c_int,
}

impl CudaLinks {
    /// The GPU with this index, through NCCL.
    ///
    /// # Errors
    /// [`FabricError::Device`], naming what is missing and where it was looked for.
    pub fn open(index: u16) -> Result<Self, FabricError> {
        let context = Context::open(i32::from(index))?;
        // SAFETY: only tries to load a library.
        if !unsafe { sys::is_culib_present() } {
            let path = std::env::var("LD_LIBRARY_PATH").ok();
            return Err(missing(NCCL, path.as_deref()));
        }
        let mut version = 0;
        // SAFETY: writes one integer.
        check(
            unsafe { sys::ncclGetVersion(&mut version) },
            ptr::null_mut(),
        )?;
        if version < VERSION_MIN {
            return Err(FabricError::Device(format!(
                "NCCL {version} cannot be stopped while it waits; install 2.14 or newer"
            )));
        }
        Ok(CudaLinks { context, version })
    }

    /// Identifies the GPU on any machine.
    pub fn unit(&self) -> &str {
        &self.context.unit
    }

    /// NCCL's, as it numbers itself; a ring's bits depend on it.
    pub fn version(&self) -> i32 {
        self.version
    }
}

impl Links for CudaLinks {
    type Fabric = CudaFabric;

    fn new_id(&self) -> Result<Vec<u8>, FabricError> {
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        // SAFETY: writes the id.
        check(unsafe { sys::ncclGetUniqueId(&mut id) }, ptr::null_mut())?;
        Ok(id.internal.iter().map(|b| *b as u8).collect())
    }

    fn open(
        &self,
        id: &[u8],
        rank: usize,
        members: usize,
        pulse: Arc<Pulse>,
    ) -> Result<CudaFabric, FabricError> {
        self.context.enter()?;
        let mut unique = sys::ncclUniqueId { internal: [0; 128] };
        if id.len() != unique.internal.len() {
            let bytes = id.len();
            return Err(FabricError::Broken(format!(
                "an id of {bytes} bytes, not 128"
            )));
        }
        for (to, from) in unique.internal.iter_mut().zip(id) {
            *to = *from as _;
        }
        let slots = || -> Result<[Pinned; 2], FabricError> {
            let slot = || Pinned::new(&self.context, SLOT_FLOATS);
            Ok([slot()?, slot()?])
        };
        let mut fabric = CudaFabric {
            communicator: ptr::null_mut(),
            stream: Stream::new()?,
            down_stream: Stream::new()?,
            kernels: Kernels::new()?,
            up: slots()?,
            down: slots()?,
            up_next: 0,
            buffers: BTreeMap::new(),
            free: Vec::new(),
            next: 0,
            narrow: None,
            pulse,
            context: Arc::clone(&self.context),
        };
        let mut config = Config {
            size: size_of::<Config>(),
            magic: CONFIG_MAGIC,
            version: VERSION_MIN as u32,
            blocking: 0,
        };
        // SAFETY: NCCL reads `size` bytes of the configuration; the communicator is written before
        // the call returns, also when it is still being made.
        let begun = unsafe {
            sys::ncclCommInitRankConfig(
                &mut fabric.communicator,
                members as c_int,
                unique,
                rank as c_int,
                (&raw mut config).cast(),
            )
        };
        check(begun, fabric.communicator)?;
        fabric.settle()?;
        Ok(fabric)
    }
}

/// A buffer: memory of this fabric's, or adopted.
struct Held {
    pointer: u64,
    memory: Option<Arc<Memory>>,
    /// Keeps adopted memory alive.
    _owner: Option<Arc<dyn DeviceOwner>>,
}

/// One GPU in one group of one generation.
pub struct CudaFabric {
    // Declared before the context, so dropped before it.
    communicator: sys::ncclComm_t,
    stream: Stream,
    down_stream: Stream,
    kernels: Kernels,
    up: [Pinned; 2],
    down: [Pinned; 2],
    up_next: usize,
    buffers: BTreeMap<usize, Held>,
    /// Released memory.
    free: Vec<Arc<Memory>>,
    next: usize,
    /// For what travels as bf16.
    narrow: Option<Arc<Memory>>,
    pulse: Arc<Pulse>,
    context: Arc<Context>,
}

// SAFETY: a communicator may be used from any thread, one at a time.
unsafe impl Send for CudaFabric {}

impl Drop for CudaFabric {
    fn drop(&mut self) {
        // Streams, events and modules go with the context that they were made in.
        let _ = self.context.enter();
        if !self.communicator.is_null() {
            // SAFETY: made in `open`, aborted once. A kernel that waits for a peer ends by it.
            let _ = unsafe { sys::ncclCommAbort(self.communicator) };
        }
        for stream in [&self.stream, &self.down_stream] {
            // SAFETY: both live. What is under way reads memory that is freed next.
            let _ = unsafe { result::stream::synchronize(stream.0) };
        }
    }
}

impl CudaFabric {
    fn at(&self, span: Span) -> Result<u64, FabricError> {
        let held = self.buffers.get(&span.buffer.0);
        let held = held.ok_or_else(|| FabricError::Device("a buffer that is not there".into()))?;
        Ok(held.pointer + (span.start * size_of::<f32>()) as u64)
    }

    fn keep(&mut self, held: Held) -> Buffer {
        self.next += 1;
        self.buffers.insert(self.next, held);
        Buffer(self.next)
    }

    /// Waits until the communicator has taken what it was given.
    fn settle(&self) -> Result<(), FabricError> {
        wait(&self.pulse, || self.is_settled())
    }

    fn is_settled(&self) -> Result<bool, FabricError> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives; writes one value.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.communicator, &mut state) };
        check(asked, self.communicator)?;
        check(state, self.communicator)?;
        Ok(state != sys::ncclResult_t::ncclInProgress)
    }

    fn wait_for(&self, event: &Event) -> Result<(), FabricError> {
        wait(&self.pulse, || {
            // Asked for its errors only.
            self.is_settled()?;
            event.is_done()
        })
    }

    fn check(&self, answered: sys::ncclResult_t) -> Result<(), FabricError> {
        check(answered, self.communicator)
    }

    /// Posts one message inside a group.
    fn post(&self, transfer: &Transfer) -> Result<(), FabricError> {
        let float = sys::ncclDataType_t::ncclFloat32;
        let (communicator, stream) = (self.communicator, self.stream.0.cast());
        // SAFETY: spans lie in live memory; the stream is this fabric's.
        let posted = match transfer {
            Transfer::Send { to, from } => unsafe {
                let at = self.at(*from)? as *const c_void;
                sys::ncclSend(at, from.len, float, *to as c_int, communicator, stream)
            },
            Transfer::Receive { from, into } => unsafe {
                let at = self.at(*into)? as *mut c_void;
                sys::ncclRecv(at, into.len, float, *from as c_int, communicator, stream)
            },
        };
        self.check(posted)
    }
}

impl Fabric for CudaFabric {
    type Mark = Event;

    fn enter(&mut self) -> Result<(), FabricError> {
        self.pulse.check()?;
        self.context.enter()
    }

    fn alloc(&mut self, len: usize) -> Result<Buffer, FabricError> {
        let fits = |m: &Arc<Memory>| m.len == len && Arc::strong_count(m) == 1;
        let memory = match self.free.iter().position(fits) {
            Some(place) => self.free.swap_remove(place),
            None => Memory::new(&self.context, len)?,
        };
        Ok(self.keep(Held {
            pointer: memory.pointer,
            memory: Some(memory),
            _owner: None,
        }))
    }

    fn adopt(&mut self, floats: &DeviceFloats) -> Result<Buffer, FabricError> {
        Ok(self.keep(Held {
            pointer: floats.pointer,
            memory: None,
            _owner: Some(Arc::clone(&floats.owner)),
        }))
    }

    fn release(&mut self, buffer: Buffer) {
        let held = self.buffers.remove(&buffer.0);
        self.free.extend(held.and_then(|h| h.memory));
    }

    fn lend(&mut self, buffer: Buffer) -> Option<DeviceFloats> {
        let memory = self.buffers.get(&buffer.0)?.memory.as_ref()?;
        Some(DeviceFloats {
            pointer: memory.pointer,
            len: memory.len,
            owner: Arc::clone(memory) as Arc<dyn DeviceOwner>,
        })
    }

    fn upload(&mut self, from: &[f32], into: Span) -> Result<(), FabricError> {
        let mut at = self.at(into)?;
        for chunk in from.chunks(SLOT_FLOATS) {
            self.up_next ^= 1;
            if let Some(last) = self.up[self.up_next].last.take() {
                self.wait_for(&last)?;
            }
            let slot = &mut self.up[self.up_next];
            let floats = slot.floats(chunk.len());
            floats.copy_from_slice(chunk);
            // SAFETY: the slot is not written again before `last` is reached.
            let copied = unsafe { result::memcpy_htod_async(at, floats, self.stream.0) };
            copied.map_err(failed("a copy to the GPU"))?;
            slot.last = Some(self.stream.mark()?);
            at += size_of_val(chunk) as u64;
        }
        Ok(())
    }

    fn add(&mut self, left: Span, right: Span, into: Span) -> Result<(), FabricError> {
        let at = [self.at(left)?, self.at(right)?, self.at(into)?];
        self.kernels.add(&self.stream, at, into.len)
    }

    fn divide(&mut self, from: Span, by: f32, into: Span) -> Result<(), FabricError> {
        let at = [self.at(from)?, self.at(into)?];
        self.kernels.divide(&self.stream, at, by, into.len)
    }

    fn exchange(&mut self, transfers: &[Transfer]) -> Result<(), FabricError> {
        if transfers.is_empty() {
            return Ok(());
        }
        // SAFETY: a group is opened and, whatever happens in between, closed.
        self.check(unsafe { sys::ncclGroupStart() })?;
        let posted = transfers.iter().try_for_each(|t| self.post(t));
        // SAFETY: as above.
        let ended = self.check(unsafe { sys::ncclGroupEnd() });
        posted.and(ended)?;
        self.settle()
    }

    fn ring_sum(&mut self, span: Span, wire: Wire) -> Result<(), FabricError> {
        let at = self.at(span)?;
        let narrow = match (wire, &self.narrow) {
            (Wire::F32, _) => None,
            (Wire::Bf16, Some(narrow)) if narrow.len * 2 >= span.len => Some(narrow.pointer),
            (Wire::Bf16, _) => {
                let memory = Memory::new(&self.context, span.len.div_ceil(2))?;
                Some(self.narrow.insert(memory).pointer)
            }
        };
        let (place, kind) = match narrow {
            None => (at, sys::ncclDataType_t::ncclFloat32),
            Some(narrow) => {
                self.kernels.narrow(&self.stream, [at, narrow], span.len)?;
                (narrow, sys::ncclDataType_t::ncclBfloat16)
            }
        };
        let place = place as *mut c_void;
        // SAFETY: `span.len` elements lie at `place`; in place is allowed.
        let summed = unsafe {
            sys::ncclAllReduce(
                place,
                place,
                span.len,
                kind,
                sys::ncclRedOp_t::ncclSum,
                self.communicator,
                self.stream.0.cast(),
            )
        };
        self.check(summed)?;
        self.settle()?;
        match narrow {
            None => Ok(()),
            Some(narrow) => self.kernels.widen(&self.stream, [narrow, at], span.len),
        }
    }

    fn broadcast(&mut self, root: usize, span: Span) -> Result<(), FabricError> {
        let place = self.at(span)? as *mut c_void;
        // SAFETY: `span.len` floats lie at `place`; in place is allowed.
        let sent = unsafe {
            sys::ncclBroadcast(
                place,
                place,
                span.len,
                sys::ncclDataType_t::ncclFloat32,
                root as c_int,
                self.communicator,
                self.stream.0.cast(),
            )
        };
        self.check(sent)?;
        self.settle()
    }

    fn mark(&mut self) -> Result<Event, FabricError> {
        self.stream.mark()
    }

    fn download(&mut self, after: Event, from: Span, into: &mut [f32]) -> Result<(), FabricError> {
        self.down_stream.wait_for(&after)?;
        let mut at = self.at(from)?;
        let mut under_way: Option<(usize, &mut [f32])> = None;
        let mut next = 0;
        for chunk in into.chunks_mut(SLOT_FLOATS) {
            let slot = &mut self.down[next];
            let floats = slot.floats(chunk.len());
            // SAFETY: what the slot held was taken out before; nobody looks before `last`.
            let copied = unsafe { result::memcpy_dtoh_async(floats, at, self.down_stream.0) };
            copied.map_err(failed("a copy from the GPU"))?;
            slot.last = Some(self.down_stream.mark()?);
            at += size_of_val(chunk) as u64;
            if let Some((slot, chunk)) = under_way.replace((next, chunk)) {
                self.take_down(slot, chunk)?;
            }
            next ^= 1;
        }
        match under_way {
            Some((slot, chunk)) => self.take_down(slot, chunk),
            None => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<(), FabricError> {
        let all = self.stream.mark()?;
        self.wait_for(&all)
    }
}

impl CudaFabric {
    fn take_down(&mut self, slot: usize, into: &mut [f32]) -> Result<(), FabricError> {
        if let Some(last) = self.down[slot].last.take() {
            self.wait_for(&last)?;
        }
        into.copy_from_slice(self.down[slot].floats(into.len()));
        Ok(())
    }
}

/// What NCCL's answer means: a peer's fault, or this process's.
fn check(answered: sys::ncclResult_t, communicator: sys::ncclComm_t) -> Result<(), FabricError> {
    use sys::ncclResult_t as R;
    if matches!(answered, R::ncclSuccess | R::ncclInProgress) {
        return Ok(());
    }
    // SAFETY: both give a static or communicator-owned text, or null.
    let (what, more) = unsafe {
        let more = match communicator.is_null() {
            true => ptr::null(),
            false => sys::ncclGetLastError(communicator),
        };
        (text(sys::ncclGetErrorString(answered)), text(more))
    };
    let told = format!("NCCL: {what} {more}").trim_end().to_owned();
    Err(match answered {
        R::ncclUnhandledCudaError | R::ncclInvalidArgument | R::ncclInvalidUsage => {
            FabricError::Device(told)
        }
        _ => FabricError::Broken(told),
    })
}

/// # Safety
/// `text` is null or a string that ends in a zero.
unsafe fn text(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: as the caller promises.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}
