//! What a store said, by what the caller can do about it; never by the words of a message.

use std::error::Error as _;

use object_store::Error as Said;

use super::location::Scheme;

/// What a store said, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The location is neither a path nor a URL that is understood.
    #[error("{location}: {reason}")]
    Location {
        /// As given, without what may be secret.
        location: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// No credentials were found, or what names them is wrong.
    #[error("{location}: {reason}")]
    Credentials {
        /// As given, without what may be secret.
        location: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Nothing is there.
    #[error("{key} does not exist; check the path{}", scheme.container())]
    NotFound {
        /// The key with its root.
        key: String,
        /// Where it is not.
        scheme: Scheme,
    },
    /// The credentials do not allow it.
    #[error("{key}: access denied; {}", scheme.credentials())]
    Denied {
        /// The key with its root.
        key: String,
        /// Who denied it.
        scheme: Scheme,
        /// What the store said.
        #[source]
        source: Box<Said>,
    },
    /// A store that is only read was to be written or listed.
    #[error(
        "{key}: http and https are read-only: nothing can be written or listed there; name a folder \
         or the store itself (s3://, gs://, az://)"
    )]
    ReadOnly {
        /// The key with its root.
        key: String,
    },
    /// The disk is full.
    #[error("{key}: no space left on the device; free some and start again with --resume")]
    Full {
        /// The key with its root.
        key: String,
        /// What the store said.
        #[source]
        source: Box<Said>,
    },
    /// Anything else, after the store client's own retries: to try again later may help.
    #[error("{key}: {source}")]
    Other {
        /// The key with its root.
        key: String,
        /// What the store said.
        #[source]
        source: Box<Said>,
    },
}

impl StoreError {
    /// Whether the same request may succeed later.
    pub fn may_pass(&self) -> bool {
        matches!(self, StoreError::Other { .. })
    }

    pub(super) fn of(key: String, scheme: Scheme, source: Said) -> Self {
        let full = storage_full(&source);
        match source {
            Said::NotFound { .. } => StoreError::NotFound { key, scheme },
            Said::PermissionDenied { .. } | Said::Unauthenticated { .. } => {
                let source = Box::new(source);
                StoreError::Denied {
                    key,
                    scheme,
                    source,
                }
            }
            source => {
                let source = Box::new(source);
                if full {
                    StoreError::Full { key, source }
                } else {
                    StoreError::Other { key, source }
                }
            }
        }
    }
}

/// The first error of the system below `error`, if there is one.
fn storage_full(error: &Said) -> bool {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::StorageFull
        {
            return true;
        }
        cause = inner.source();
    }
    false
}
