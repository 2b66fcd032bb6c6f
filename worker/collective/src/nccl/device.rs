//! One GPU through the driver's own calls: its context, memory, pinned memory, order of operations
//! and the few kernels of a sum. Nothing here knows of other members.

use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{result, sys};

use super::fabric::{FabricError, Pulse};
use super::library::{DRIVER, missing};
use crate::floats::DeviceOwner;

/// The kernels of a sum, as the driver compiles them. Assembler, because its instructions carry
/// their rounding mode and no compiler stands between them and the bits; and no library more.
const KERNELS: &str = concat!(include_str!("kernels.ptx"), "\0");
/// Threads of a block and blocks of a grid: enough to fill any GPU with a streaming kernel.
const THREADS: u32 = 256;
const BLOCKS_MAX: usize = 1024;
/// A wait begins with so many looks in a row, then pauses between them.
const LOOKS_WITHOUT_PAUSE: u32 = 200;
const PAUSE: Duration = Duration::from_micros(50);

/// What the driver said.
pub(super) fn failed(what: &str) -> impl FnOnce(result::DriverError) -> FabricError {
    move |error| FabricError::Device(format!("{what}: {error:?}"))
}

/// The primary context of a GPU, which Burn's runtime shares.
#[derive(Debug)]
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// Identifies the GPU on any machine.
    pub unit: String,
}

// SAFETY: a CUDA context may be used from any thread that makes it current, as `enter` does.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Context {}

impl Context {
    /// # Errors
    /// [`FabricError::Device`], naming what is missing.
    pub fn open(index: i32) -> Result<Arc<Self>, FabricError> {
        // SAFETY: only tries to load a library.
        if !unsafe { sys::is_culib_present() } {
            let path = std::env::var("LD_LIBRARY_PATH").ok();
            return Err(missing(DRIVER, path.as_deref()));
        }
        result::init().map_err(failed("the NVIDIA driver does not start"))?;
        let device = result::device::get(index).map_err(failed("there is no such GPU"))?;
        let uuid = result::device::get_uuid(device).map_err(failed("the GPU's uuid"))?;
        let unit = uuid.bytes.iter().map(|b| format!("{:02x}", *b as u8));
        // SAFETY: `device` comes from the driver; released in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) };
        let context = context.map_err(failed("the GPU's primary context"))?;
        Ok(Arc::new(Context {
            device,
            context,
            unit: unit.collect(),
        }))
    }

    /// Makes the context current on this thread.
    ///
    /// # Errors
    /// [`FabricError::Device`].
    pub fn enter(&self) -> Result<(), FabricError> {
        // SAFETY: the context is retained while `self` lives.
        let entered = unsafe { result::ctx::set_current(self.context) };
        entered.map_err(failed("the GPU's context"))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`. A failure leaves it to the end of the process.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Device memory of `len` floats.
#[derive(Debug)]
pub(super) struct Memory {
    context: Arc<Context>,
    pub pointer: sys::CUdeviceptr,
    pub len: usize,
}

impl Memory {
    pub fn new(context: &Arc<Context>, len: usize) -> Result<Arc<Self>, FabricError> {
        let bytes = len.max(1) * size_of::<f32>();
        // SAFETY: the caller's thread is in the context; content is written before it is read.
        let pointer = unsafe { result::malloc_sync(bytes) };
        let pointer = pointer.map_err(|e| {
            FabricError::Device(format!("no {bytes} bytes of GPU memory for the sum: {e:?}"))
        })?;
        Ok(Arc::new(Memory {
            context: Arc::clone(context),
            pointer,
            len,
        }))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated in `new`, freed once; the driver waits for what still uses it.
            let _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}

impl DeviceOwner for Memory {
    fn to_host(&self) -> Result<Vec<f32>, String> {
        self.context.enter().map_err(|e| e.to_string())?;
        let mut values = vec![0.0f32; self.len];
        // SAFETY: `len` floats lie there, written before they were lent.
        let copied = unsafe { result::memcpy_dtoh_sync(&mut values, self.pointer) };
        copied.map_err(|e| format!("{e:?}"))?;
        Ok(values)
    }
}

/// Host memory that the GPU copies from and to without the driver's staging.
#[derive(Debug)]
pub(super) struct Pinned {
    context: Arc<Context>,
    start: *mut f32,
    len: usize,
    /// What last used it.
    pub last: Option<Event>,
}

// SAFETY: the memory is this struct's alone, and reached through `&mut self`.
unsafe impl Send for Pinned {}

impl Pinned {
    pub fn new(context: &Arc<Context>, len: usize) -> Result<Self, FabricError> {
        // SAFETY: the caller's thread is in the context.
        let start = unsafe { result::malloc_host(len * size_of::<f32>(), 0) };
        let start = start.map_err(failed("pinned host memory"))?.cast::<f32>();
        // SAFETY: `len` floats were just allocated; zero bytes are floats.
        unsafe { start.write_bytes(0, len) };
        Ok(Pinned {
            context: Arc::clone(context),
            start,
            len,
            last: None,
        })
    }

    /// The first `len` floats. Nothing may be under way that uses them.
    pub fn floats(&mut self, len: usize) -> &mut [f32] {
        // SAFETY: `start` points to `self.len` initialised floats.
        unsafe { std::slice::from_raw_parts_mut(self.start, len.min(self.len)) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated in `new`, freed once.
            let _ = unsafe { result::free_host(self.start.cast()) };
        }
    }
}

/// A moment in a stream.
#[derive(Debug)]
pub struct Event(sys::CUevent);

// SAFETY: an event may be asked and destroyed from any thread in its context.
unsafe impl Send for Event {}

impl Event {
    /// Whether everything before it is done.
    pub fn is_done(&self) -> Result<bool, FabricError> {
        // SAFETY: created in `Stream::mark`.
        match unsafe { result::event::query(self.0) } {
            Ok(()) => Ok(true),
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(e) => Err(failed("the GPU")(e)),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: destroyed once; the driver allows it before it is reached.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// An order of operations of its own, beside Burn's.
#[derive(Debug)]
pub(super) struct Stream(pub sys::CUstream);

// SAFETY: a stream may be used from any thread in its context, one at a time.
unsafe impl Send for Stream {}

impl Stream {
    pub fn new() -> Result<Self, FabricError> {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        Ok(Stream(stream.map_err(failed("a stream"))?))
    }

    pub fn mark(&self) -> Result<Event, FabricError> {
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = Event(result::event::create(flags).map_err(failed("an event"))?);
        // SAFETY: both live.
        unsafe { result::event::record(event.0, self.0) }.map_err(failed("an event"))?;
        Ok(event)
    }

    pub fn wait_for(&self, event: &Event) -> Result<(), FabricError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live.
        let waits = unsafe { result::stream::wait_event(self.0, event.0, flags) };
        waits.map_err(failed("a stream"))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: destroyed once; the driver lets it finish.
        let _ = unsafe { result::stream::destroy(self.0) };
    }
}

/// The loaded kernels.
#[derive(Debug)]
pub(super) struct Kernels {
    module: sys::CUmodule,
    add: sys::CUfunction,
    divide: sys::CUfunction,
    narrow: sys::CUfunction,
    widen: sys::CUfunction,
}

// SAFETY: modules and functions may be used from any thread in their context.
unsafe impl Send for Kernels {}

impl Kernels {
    pub fn new() -> Result<Self, FabricError> {
        let image = KERNELS.as_ptr().cast::<c_void>();
        // SAFETY: a text that ends in a zero.
        let module = unsafe { result::module::load_data(image) };
        let module = module.map_err(failed("the kernels of the sum"))?;
        let find = |name: &str| {
            let name = CString::new(name).map_err(|e| FabricError::Device(e.to_string()))?;
            // SAFETY: the module is loaded.
            let found = unsafe { result::module::get_function(module, name) };
            found.map_err(failed("a kernel of the sum"))
        };
        Ok(Kernels {
            module,
            add: find("belfry_add")?,
            divide: find("belfry_divide")?,
            narrow: find("belfry_narrow")?,
            widen: find("belfry_widen")?,
        })
    }

    /// `into = left + right`, `n` floats each.
    pub fn add(&self, stream: &Stream, at: [u64; 3], n: usize) -> Result<(), FabricError> {
        let [mut left, mut right, mut into] = at;
        let mut count = n as u64;
        let mut params = [
            (&raw mut left).cast(),
            (&raw mut right).cast(),
            (&raw mut into).cast(),
            (&raw mut count).cast(),
        ];
        launch(self.add, stream, n, &mut params)
    }

    /// `into = from / by`, `n` floats.
    pub fn divide(
        &self,
        stream: &Stream,
        at: [u64; 2],
        mut by: f32,
        n: usize,
    ) -> Result<(), FabricError> {
        let [mut from, mut into] = at;
        let mut count = n as u64;
        let mut params = [
            (&raw mut from).cast(),
            (&raw mut by).cast(),
            (&raw mut into).cast(),
            (&raw mut count).cast(),
        ];
        launch(self.divide, stream, n, &mut params)
    }

    /// f32 at the first address to bf16 at the second.
    pub fn narrow(&self, stream: &Stream, at: [u64; 2], n: usize) -> Result<(), FabricError> {
        convert(self.narrow, stream, at, n)
    }

    /// bf16 at the first address to f32 at the second.
    pub fn widen(&self, stream: &Stream, at: [u64; 2], n: usize) -> Result<(), FabricError> {
        convert(self.widen, stream, at, n)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        // SAFETY: loaded in `new`, unloaded once.
        let _ = unsafe { result::module::unload(self.module) };
    }
}

fn convert(
    kernel: sys::CUfunction,
    stream: &Stream,
    [mut from, mut into]: [u64; 2],
    n: usize,
) -> Result<(), FabricError> {
    let mut count = n as u64;
    let mut params = [
        (&raw mut from).cast(),
        (&raw mut into).cast(),
        (&raw mut count).cast(),
    ];
    launch(kernel, stream, n, &mut params)
}

fn launch(
    kernel: sys::CUfunction,
    stream: &Stream,
    n: usize,
    params: &mut [*mut c_void],
) -> Result<(), FabricError> {
    if n == 0 {
        return Ok(());
    }
    let blocks = n.div_ceil(THREADS as usize).min(BLOCKS_MAX) as u32;
    let (grid, block) = ((blocks, 1, 1), (THREADS, 1, 1));
    // SAFETY: `params` are the kernel's, in its order; their addresses lie in live memory of `n`
    // elements. The driver copies them before it returns.
    let launched = unsafe { result::launch_kernel(kernel, grid, block, 0, stream.0, params) };
    launched.map_err(failed("a kernel of the sum"))
}

/// Waits until `done`, or until the pulse is stopped or `done` fails.
pub(super) fn wait(
    pulse: &Pulse,
    mut done: impl FnMut() -> Result<bool, FabricError>,
) -> Result<(), FabricError> {
    let mut looks = 0;
    while !done()? {
        pulse.check()?;
        if looks < LOOKS_WITHOUT_PAUSE {
            looks += 1;
            std::hint::spin_loop();
        } else {
            std::thread::sleep(PAUSE);
        }
    }
    Ok(())
}
