//! Where things live: a folder, a bucket or a web server, by one URL.
//!
//! Used by packers, the data plane, the coordinator's journal and the workers' checkpoints. What a
//! location means stands in `location`, where credentials come from in `s3` and `cloud`.

mod cloud;
mod environment;
mod error;
mod large;
mod location;
mod process;
mod profile;
mod s3;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt as _,
    PutMode, PutOptions, PutPayload, RetryConfig, memory::InMemory,
};

pub use environment::Environment;
pub use error::StoreError;
use location::Location;
pub use location::Scheme;
use profile::Files;

/// A server that answers takes a connection at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Nothing came for so long: the connection is dead. Also the longest time of one part's upload.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest request, for one that trickles.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(600);
/// No retry begins later than this after the first try.
const RETRY_TIMEOUT: Duration = Duration::from_secs(120);
/// Retries of one request. A body that breaks goes on where it broke and counts as one: a link that
/// is cut after every megabyte still carries a range of 16.
const RETRIES_MAX: usize = 20;
const BACK_OFF_MIN: Duration = Duration::from_millis(100);
const BACK_OFF_MAX: Duration = Duration::from_secs(2);

/// The outcome of a put-if-absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// This call created it.
    Yes,
    /// It was there before.
    Exists,
}

/// An object as it is listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Relative to the root.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// When it was put, by the store's clock.
    pub modified: SystemTime,
}

/// A folder or a bucket's prefix.
#[derive(Clone, Debug)]
pub struct Root {
    store: Arc<dyn ObjectStore>,
    scheme: Scheme,
    prefix: Path,
    url: String,
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl Root {
    /// Opens a folder (made when missing), or a store by its URL: `file://`, `s3://bucket/prefix`,
    /// `gs://bucket/prefix`, `az://container/prefix`, and `http(s)://host/path` to read. Settings and
    /// credentials come from the URL, this process's environment and AWS's profile files.
    ///
    /// # Errors
    /// [`StoreError::Location`] and [`StoreError::Credentials`].
    pub fn open(location: &str) -> Result<Self, StoreError> {
        Root::open_in(location, &Environment::of_process())
    }

    /// Opens what is read and must be there: as [`Root::open`], but a missing folder is not made.
    ///
    /// # Errors
    /// As [`Root::open`], and when there is no such folder.
    pub fn existing(location: &str) -> Result<Self, StoreError> {
        let parsed = Location::parse(location)?;
        if parsed.scheme == Scheme::Folder && !std::path::Path::new(&parsed.shown).is_dir() {
            return Err(parsed.wrong("no such folder"));
        }
        Root::open(location)
    }

    /// As [`Root::open`], where no request is tried again: for callers that do so themselves, for as long as it
    /// takes, and want to hear at once why it is not done.
    ///
    /// # Errors
    /// As [`Root::open`].
    pub fn open_once(location: &str) -> Result<Self, StoreError> {
        Root::open_with(location, &Environment::of_process(), 0)
    }

    /// As [`Root::open`] with an environment that is given.
    ///
    /// # Errors
    /// As [`Root::open`].
    pub fn open_in(location: &str, environment: &Environment) -> Result<Self, StoreError> {
        Root::open_with(location, environment, RETRIES_MAX)
    }

    fn open_with(
        location: &str,
        environment: &Environment,
        retries_max: usize,
    ) -> Result<Self, StoreError> {
        let location = Location::parse(location)?;
        let (client, retry) = patience(&location, retries_max)?;
        let store: Arc<dyn ObjectStore> = match location.scheme {
            Scheme::Folder => return Root::folder(&location),
            Scheme::Memory => Arc::new(InMemory::new()),
            Scheme::S3 => {
                let files = Files::read(environment).map_err(|reason| StoreError::Credentials {
                    location: location.shown.clone(),
                    reason,
                })?;
                let settings = s3::settings(&location, environment, &files)?;
                Arc::new(s3::open(&location, settings, client, retry)?)
            }
            Scheme::Gcs => Arc::new(cloud::google(&location, environment, client, retry)?),
            Scheme::Azure => Arc::new(cloud::azure(&location, environment, client, retry)?),
            Scheme::Http => Arc::new(cloud::http(&location, client, retry)?),
        };
        Ok(Root {
            store,
            scheme: location.scheme,
            prefix: location.prefix,
            url: location.shown,
        })
    }

    fn folder(location: &Location) -> Result<Self, StoreError> {
        let folder = &location.shown;
        std::fs::create_dir_all(folder).map_err(|e| location.wrong(e.to_string()))?;
        let absolute = std::fs::canonicalize(folder).map_err(|e| location.wrong(e.to_string()))?;
        // A file is written beside its place, synchronised and renamed: whatever dies, power included,
        // an answered put is whole, and one that was not is not there.
        let store = LocalFileSystem::new_with_prefix(&absolute)
            .map_err(|e| location.wrong(e.to_string()))?
            .with_fsync(true);
        Ok(Root {
            store: Arc::new(store),
            scheme: Scheme::Folder,
            prefix: Path::default(),
            url: format!("{}", absolute.display()),
        })
    }

    /// The local folder, where the root is one.
    pub fn local_folder(&self) -> Option<std::path::PathBuf> {
        (self.scheme == Scheme::Folder).then(|| self.url.clone().into())
    }

    fn path(&self, relative: &str) -> Path {
        // As it is, so that what other tools wrote is found and what is listed can be read; only what
        // no store takes is escaped.
        let relative = Path::parse(relative).unwrap_or_else(|_| Path::from(relative));
        self.prefix.parts().chain(relative.parts()).collect()
    }

    fn named(&self, relative: &str, source: object_store::Error) -> StoreError {
        StoreError::of(format!("{}/{relative}", self.url), self.scheme, source)
    }

    fn writable(&self, relative: &str) -> Result<(), StoreError> {
        if self.scheme == Scheme::Http {
            let key = format!("{}/{relative}", self.url);
            return Err(StoreError::ReadOnly { key });
        }
        Ok(())
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

    /// Bytes `range` of the object as they come, in pieces of any size: nothing is copied together. A
    /// body that breaks goes on where it broke.
    ///
    /// # Errors
    /// [`StoreError`], naming the key; of the request or of a piece.
    pub async fn stream_range(
        &self,
        relative: &str,
        range: std::ops::Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, StoreError>>, StoreError> {
        let options = GetOptions::new().with_range(Some(range));
        let got = self.store.get_opts(&self.path(relative), options).await;
        let got = got.map_err(|e| self.named(relative, e))?;
        let (root, relative) = (self.clone(), relative.to_owned());
        let pieces = got.into_stream();
        Ok(pieces.map_err(move |e| root.named(&relative, e)).boxed())
    }

    /// Writes the object whole, replacing what was there.
    ///
    /// # Errors
    /// [`StoreError`], naming the key.
    pub async fn put(&self, relative: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.writable(relative)?;
        let put = self
            .store
            .put(&self.path(relative), PutPayload::from(bytes))
            .await;
        put.map(|_| ()).map_err(|e| self.named(relative, e))
    }

    /// Removes the object; that it is gone already is no error.
    ///
    /// # Errors
    /// [`StoreError`], naming the key.
    pub async fn delete(&self, relative: &str) -> Result<(), StoreError> {
        self.writable(relative)?;
        match self.store.delete(&self.path(relative)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(self.named(relative, e)),
        }
    }

    /// Writes the object only if nothing is there.
    ///
    /// # Errors
    /// [`StoreError`], naming the key.
    pub async fn create(&self, relative: &str, bytes: Bytes) -> Result<Created, StoreError> {
        self.writable(relative)?;
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
        Ok(sizes(self.objects(relative).await?))
    }

    /// Objects below `relative`, sorted by key.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn objects(&self, relative: &str) -> Result<Vec<Listed>, StoreError> {
        self.writable(relative)?;
        let listing = self.store.list(Some(&self.path(relative)));
        self.listed(relative, listing).await
    }

    /// The same, but only keys that sort behind `key`, present or not: the end of a long listing costs
    /// no more than that of a short one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn list_after(
        &self,
        relative: &str,
        key: &str,
    ) -> Result<Vec<(String, u64)>, StoreError> {
        self.writable(relative)?;
        let (prefix, offset) = (self.path(relative), self.path(key));
        let listing = self.store.list_with_offset(Some(&prefix), &offset);
        Ok(sizes(self.listed(relative, listing).await?))
    }

    async fn listed(
        &self,
        relative: &str,
        listing: BoxStream<'static, object_store::Result<ObjectMeta>>,
    ) -> Result<Vec<Listed>, StoreError> {
        let skip = self.prefix.as_ref().len() + usize::from(!self.prefix.as_ref().is_empty());
        let listing = listing.map_ok(|meta| {
            let key = meta.location.as_ref();
            Listed {
                key: key[skip.min(key.len())..].to_owned(),
                bytes: meta.size,
                modified: meta.last_modified.into(),
            }
        });
        let listed: Result<Vec<Listed>, _> = listing.try_collect().await;
        let mut objects = listed.map_err(|e| self.named(relative, e))?;
        objects.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(objects)
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

fn sizes(objects: Vec<Listed>) -> Vec<(String, u64)> {
    objects.into_iter().map(|o| (o.key, o.bytes)).collect()
}

/// How long requests may take and how often they are tried again.
fn patience(
    location: &Location,
    retries_max: usize,
) -> Result<(ClientOptions, RetryConfig), StoreError> {
    let read_timeout = location.seconds("read_timeout_s")?.unwrap_or(READ_TIMEOUT);
    let retry_timeout = location.seconds("retry_timeout_s")?;
    let client = ClientOptions::new()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_read_timeout(read_timeout)
        .with_timeout(REQUEST_TIMEOUT);
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: BACK_OFF_MIN,
            max_backoff: BACK_OFF_MAX,
            base: 2.0,
        },
        max_retries: retries_max,
        retry_timeout: retry_timeout.unwrap_or(RETRY_TIMEOUT),
    };
    Ok((client, retry))
}
