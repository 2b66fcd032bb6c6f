//! Identifiers as types, so that a step is never taken for a generation.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The next one.
            #[must_use]
            pub const fn next(self) -> Self {
                $name(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A worker for its whole life, over restarts of its process.
    WorkerId,
    u64
);
id!(
    /// A worker's place in one generation.
    Rank,
    u32
);
id!(
    /// One membership of workers with its lane assignment.
    Generation,
    u64
);
id!(
    /// One leadership of a coordinator.
    Term,
    u64
);
id!(
    /// 0-based count of committed optimizer updates.
    Step,
    u64
);
id!(
    /// A logical data-parallel slot.
    Lane,
    u32
);

/// A 128-bit digest of numbers (xxh3); agreement on it stands for agreement on the bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub u128);

impl Digest {
    /// Sixteen bytes, little-endian, as messages carry it.
    pub fn to_bytes(self) -> Vec<u8> {
        self.0.to_le_bytes().to_vec()
    }

    /// Folds the next lane's digest in: a digest of lanes in their order.
    #[must_use]
    pub const fn fold(self, next: Digest) -> Self {
        Digest(self.0.rotate_left(7) ^ next.0)
    }

    /// From a message's field; `None` when it is not sixteen bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes
            .try_into()
            .ok()
            .map(|b| Digest(u128::from_le_bytes(b)))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
