//! Phases of a step as `tracing` spans, for whoever wants to know where the time goes.
//!
//! A phase that nobody records costs one atomic load. A recorded one waits for the device at both
//! ends, so that work which was queued before it, or in it, counts where it belongs. It changes when
//! things are computed and never what: no tensor is touched. It refuses to know who records.

use burn::tensor::Device;
use tracing::Span;
use tracing::span::EnteredSpan;

/// Target of all phases' spans.
pub const PHASES: &str = "belfry::phase";

/// Name of the phase in which a thread only waits for others; it is no work.
pub const WAITING: &str = "waiting for threads";

/// An open phase; it ends where this is dropped, on the thread that began it.
#[must_use = "a phase ends where it is dropped"]
pub struct Phase(Option<(EnteredSpan, Device)>);

impl Phase {
    /// Begins the phase of `span` on `device`.
    pub fn begin(span: Span, device: &Device) -> Self {
        if span.is_disabled() {
            return Phase(None);
        }
        settle(device);
        Phase(Some((span.entered(), device.clone())))
    }
}

impl Drop for Phase {
    fn drop(&mut self) {
        if let Some((_, device)) = &self.0 {
            settle(device);
        }
    }
}

/// Waits for the device. What failed on it is told by whoever reads the tensors.
fn settle(device: &Device) {
    let _ = device.sync();
}

/// Begins a phase by its name.
macro_rules! phase {
    ($device:expr, $name:expr) => {
        $crate::phase::Phase::begin(
            tracing::trace_span!(target: $crate::phase::PHASES, $name),
            $device,
        )
    };
}

pub(crate) use phase;
