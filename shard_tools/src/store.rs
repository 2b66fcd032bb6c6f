//! Where things live: a folder or a bucket, by one URL.
//!
//! Used by packers, the data plane, the coordinator's journal and the workers' checkpoints.

mod delete;
mod large;

use std::error::Error as _;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload, memory::InMemory,
};

/// What a store said, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The location is neither a path nor a URL that is understood.
    #[error("{location}: {reason}; use a folder, file://, s3://bucket/prefix")]
    Location {
        /// As given.
        location: String,
        /// What is wrong.
        reason: String,
    },
    /// Nothing is there.
    #[error("{key} does not exist; check the path, or that the bucket exists")]
    NotFound {
        /// The key with its root.
        key: String,
    },
    /// The credentials do not allow it.
    #[error(
        "{key}: access denied; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, that the bucket \
         exists, and its policy"
    )]
    Denied {
        /// The key with its root.
        key: String,
        /// What the store said.
        #[source]
        source: Box<object_store::Error>,
    },
    /// The disk is full.
    #[error("{key}: no space left on the device; free some and start again with --resume")]
    Full {
        /// The key with its root.
        key: String,
        /// What the store said.
        #[source]
        source: Box<object_store::Error>,
    },
    /// Anything else, after the store's own retries.
    #[error("{key}: {source}")]
    Other {
        /// The key with its root.
        key: String,
        /// What the store said.
        #[source]
        source: Box<object_store::Error>,
    },
}

/// The outcome of a put-if-absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// This call created it.
    Yes,
    /// It was there before.
    Exists,
}

/// A folder or a bucket's prefix.
#[derive(Clone, Debug)]
pub struct Root {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    url: String,
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl Root {
    /// Opens a folder (made when missing), `file://…` or `s3://bucket/prefix`. Credentials, region and
    /// endpoint of S3 come from the usual `AWS_*` environment.
    ///
    /// # Errors
    /// [`StoreError::Location`].
    pub fn open(location: &str) -> Result<Self, StoreError> {
        let wrong = |reason: String| StoreError::Location {
            location: location.to_owned(),
            reason,
        };
        if let Some(rest) = location.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let plain = std::env::var("AWS_ENDPOINT_URL").is_ok_and(|e| e.starts_with("http://"));
            let mut builder = AmazonS3Builder::from_env()
                .with_bucket_name(bucket)
                .with_allow_http(plain)
                .with_conditional_put(S3ConditionalPut::ETagMatch);
            if let Ok(endpoint) = std::env::var("AWS_ENDPOINT_URL") {
                builder = builder.with_endpoint(endpoint);
            }
            let store = builder.build().map_err(|e| wrong(e.to_string()))?;
            return Ok(Root {
                store: Arc::new(store),
                prefix: Path::from(prefix.trim_end_matches('/')),
                url: location.trim_end_matches('/').to_owned(),
            });
        }
        if location == "memory://" {
            return Ok(Root {
                store: Arc::new(InMemory::new()),
                prefix: Path::default(),
                url: location.to_owned(),
            });
        }
        let folder = location.strip_prefix("file://").unwrap_or(location);
        if folder.contains("://") {
            return Err(wrong("unknown scheme".into()));
        }
        std::fs::create_dir_all(folder).map_err(|e| wrong(e.to_string()))?;
        let absolute = std::fs::canonicalize(folder).map_err(|e| wrong(e.to_string()))?;
        let store =
            LocalFileSystem::new_with_prefix(&absolute).map_err(|e| wrong(e.to_string()))?;
        Ok(Root {
            store: Arc::new(store),
            prefix: Path::default(),
            url: format!("{}", absolute.display()),
        })
    }

    /// The local folder, where the root is one.
    pub fn local_folder(&self) -> Option<std::path::PathBuf> {
        (!self.url.contains("://")).then(|| self.url.clone().into())
    }

    fn path(&self, relative: &str) -> Path {
        Path::from(format!("{}/{relative}", self.prefix))
    }

    fn named(&self, relative: &str, source: object_store::Error) -> StoreError {
        let key = format!("{}/{relative}", self.url);
        use object_store::Error as E;
        match source {
            E::NotFound { .. } => StoreError::NotFound { key },
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => {
                let source = Box::new(source);
                StoreError::Denied { key, source }
            }
            source => {
                let full = storage_full(&source);
                let source = Box::new(source);
                if full {
                    StoreError::Full { key, source }
                } else {
                    StoreError::Other { key, source }
                }
            }
        }
    }

    /// The whole object.
    ///
    /// # Errors
    /// [`StoreError`], naming the key.
    pub async fn get(&self, relative: &str) -> Result<Bytes, StoreError> {
        let read = async { self.store.get(&self.path(relative)).await?.bytes().await };
        read.await.map_err(|e| self.named(relative, e))
    }

    /// Bytes `range` of the object.
    ///
    /// # Errors
    /// [`StoreError`], naming the key.
    pub async fn get_range(
        &self,
        relative: &str,
        range: std::ops::Range<u64>,
    ) -> Result<Bytes, StoreError> {
        let read = self.store.get_range(&self.path(relative), range).await;
        read.map_err(|e| self.named(relative, e))
    }

    /// Writes the object whole, replacing what was there.
    ///
    /// # Errors
    /// [`StoreError`], naming the key.
    pub async fn put(&self, relative: &str, bytes: Bytes) -> Result<(), StoreError> {
        let put = self
            .store
            .put(&self.path(relative), PutPayload::from(bytes))
            .await;
        put.map(|_| ()).map_err(|e| self.named(relative, e))
    }

    /// Writes the object only if nothing is there.
    ///
    /// # Errors
    /// [`StoreError`], naming the key.
    pub async fn create(&self, relative: &str, bytes: Bytes) -> Result<Created, StoreError> {
        let options = PutOptions::from(PutMode::Create);
        let path = self.path(relative);
        match self
            .store
            .put_opts(&path, PutPayload::from(bytes), options)
            .await
        {
            Ok(_) => Ok(Created::Yes),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(Created::Exists),
            Err(e) => Err(self.named(relative, e)),
        }
    }

    /// Keys below `relative` with their sizes, sorted, relative to the root.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn list(&self, relative: &str) -> Result<Vec<(String, u64)>, StoreError> {
        let prefix = self.path(relative);
        let skip = self.prefix.as_ref().len() + usize::from(!self.prefix.as_ref().is_empty());
        let listing = self.store.list(Some(&prefix)).map_ok(|meta| {
            let key = meta.location.as_ref();
            (key[skip.min(key.len())..].to_owned(), meta.size)
        });
        let mut keys: Vec<(String, u64)> = listing
            .try_collect()
            .await
            .map_err(|e| self.named(relative, e))?;
        keys.sort();
        Ok(keys)
    }

    /// Whether the object is there.
    ///
    /// # Errors
    /// [`StoreError`], but not for its absence.
    pub async fn exists(&self, relative: &str) -> Result<bool, StoreError> {
        match self.store.head(&self.path(relative)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(self.named(relative, e)),
        }
    }
}

fn storage_full(error: &object_store::Error) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;

    async fn contract(root: &Root) {
        root.put("a/b.txt", Bytes::from_static(b"one"))
            .await
            .expect("puts");
        assert_eq!(&root.get("a/b.txt").await.expect("is there")[..], b"one");
        assert_eq!(
            &root.get_range("a/b.txt", 1..3).await.expect("is there")[..],
            b"ne"
        );
        assert!(root.exists("a/b.txt").await.expect("answers"));
        assert!(!root.exists("a/c.txt").await.expect("answers"));
        let missing = root.get("a/c.txt").await.expect_err("is not there");
        assert!(
            missing.to_string().contains("a/c.txt does not exist"),
            "{missing}"
        );
        let racers = (0..16).map(|i| root.create("a/race", Bytes::from(format!("{i}"))));
        let outcomes = futures::future::try_join_all(racers)
            .await
            .expect("all answer");
        assert_eq!(outcomes.iter().filter(|o| **o == Created::Yes).count(), 1);
        let keys: Vec<String> = root
            .list("a")
            .await
            .expect("lists")
            .into_iter()
            .map(|(k, _)| k)
            .collect();
        assert_eq!(keys, ["a/b.txt", "a/race"]);
    }

    #[tokio::test]
    async fn folders_and_memory_keep_the_contract() {
        let folder = tempfile::tempdir().expect("a folder");
        contract(&Root::open(&folder.path().display().to_string()).expect("opens")).await;
        contract(&Root::open("memory://").expect("opens")).await;
    }

    #[test]
    fn an_unknown_scheme_is_refused() {
        let refused = Root::open("ftp://host/x").expect_err("no such scheme");
        assert!(refused.to_string().contains("ftp://host/x"));
    }
}
