//! How far the copy of a state has come, seen while it goes on: an attempt that failed tells how much
//! time the next one needs.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::core::Copied;

/// Shared by a copy and by whoever tells of it.
pub(crate) struct Progress {
    /// That arrived.
    pub bytes: AtomicU64,
    bytes_total: u64,
    begun: Instant,
    liars: Mutex<Vec<SocketAddr>>,
}

impl Progress {
    /// Of a copy that begins now; of no bytes for what is no copy.
    pub fn of_bytes(bytes_total: u64) -> Arc<Self> {
        Arc::new(Progress {
            bytes: AtomicU64::new(0),
            bytes_total,
            begun: Instant::now(),
            liars: Mutex::default(),
        })
    }

    /// Sources that held or sent other bits than most.
    pub fn names(&self, liars: Vec<SocketAddr>) {
        *self.liars.lock().unwrap_or_else(PoisonError::into_inner) = liars;
    }

    /// What the coordinator is told.
    pub fn told(&self) -> Copied {
        if self.bytes_total == 0 {
            return Copied::default();
        }
        let liars = self.liars.lock().unwrap_or_else(PoisonError::into_inner);
        Copied {
            bytes: self.bytes.load(Ordering::Relaxed),
            bytes_total: self.bytes_total,
            seconds: self.begun.elapsed().as_secs_f64(),
            liars: liars.iter().map(SocketAddr::to_string).collect(),
        }
    }
}
