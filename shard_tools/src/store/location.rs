//! A location as people write it: which kind of store, which place in it, and which settings.
//!
//! Pure but for folders, which are made. It knows no credentials: no setting of a URL is secret.

use std::collections::BTreeMap;

use object_store::path::Path;
use url::Url;

use super::error::StoreError;

const UNDERSTOOD: &str = "use a folder, file://, s3://bucket/prefix, gs://bucket/prefix, \
     az://container/prefix, or http(s)://host/path to read";

/// The kinds of stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// A local folder.
    Folder,
    /// This process's memory, for tests.
    Memory,
    /// S3 and what speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage.
    Azure,
    /// Any web server; read-only.
    Http,
}

impl Scheme {
    fn of(scheme: &str) -> Option<Self> {
        Some(match scheme {
            "file" => Scheme::Folder,
            "memory" => Scheme::Memory,
            "s3" | "s3a" => Scheme::S3,
            "gs" => Scheme::Gcs,
            "az" | "azure" | "abfs" | "abfss" | "adl" => Scheme::Azure,
            "http" | "https" => Scheme::Http,
            _ => return None,
        })
    }

    /// The settings that a URL of this kind may carry, for one location alone.
    fn settings(self) -> &'static [&'static str] {
        match self {
            Scheme::Folder | Scheme::Memory => &[],
            Scheme::S3 => &[
                "anonymous",
                "endpoint",
                "profile",
                "region",
                "requester_pays",
                "virtual_hosted",
                "read_timeout_s",
                "retry_timeout_s",
            ],
            Scheme::Gcs => &["anonymous", "endpoint", "read_timeout_s", "retry_timeout_s"],
            Scheme::Azure => &[
                "account",
                "anonymous",
                "endpoint",
                "read_timeout_s",
                "retry_timeout_s",
            ],
            Scheme::Http => &["read_timeout_s", "retry_timeout_s"],
        }
    }

    /// What else to check where something is missing.
    pub(super) fn container(self) -> &'static str {
        match self {
            Scheme::S3 | Scheme::Gcs => ", or that the bucket exists",
            Scheme::Azure => ", or that account and container exist",
            Scheme::Folder | Scheme::Memory | Scheme::Http => "",
        }
    }

    /// What to check where access is denied.
    pub(super) fn credentials(self) -> &'static str {
        match self {
            Scheme::S3 => {
                "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), that the \
                 bucket exists, and its policy"
            }
            Scheme::Gcs => {
                "check GOOGLE_APPLICATION_CREDENTIALS, that the bucket exists, and its policy"
            }
            Scheme::Azure => {
                "check AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or \
                 AZURE_STORAGE_SAS_KEY, and the container's access policy"
            }
            Scheme::Http => "the server wants credentials, and none can be given to http(s)://",
            Scheme::Folder | Scheme::Memory => "check its owner and permissions",
        }
    }
}

/// A location taken apart.
#[derive(Debug)]
pub(super) struct Location {
    pub(super) scheme: Scheme,
    /// Bucket, container or host, as the URL has it; empty for folders and memory.
    pub(super) place: String,
    /// Below it, without slashes at the ends.
    pub(super) prefix: Path,
    /// What people see: the location without its settings.
    pub(super) shown: String,
    /// The part of the URL behind `?`.
    pub(super) settings: BTreeMap<String, String>,
}

impl Location {
    /// # Errors
    /// [`StoreError::Location`].
    pub(super) fn parse(location: &str) -> Result<Self, StoreError> {
        let bare = location.split(['?', '#']).next().unwrap_or(location);
        let wrong = |reason: String| StoreError::Location {
            location: bare.to_owned(),
            reason,
        };
        if !location.contains("://") {
            return Ok(Location::folder(location));
        }
        let (scheme, rest) = location.split_once("://").unwrap_or_default();
        let scheme = Scheme::of(scheme)
            .ok_or_else(|| wrong(format!("unknown scheme {scheme}://; {UNDERSTOOD}")))?;
        match scheme {
            Scheme::Folder => return Ok(Location::folder(rest)),
            Scheme::Memory => {
                return Ok(Location {
                    scheme,
                    place: String::new(),
                    prefix: Path::from(rest),
                    shown: location.to_owned(),
                    settings: BTreeMap::new(),
                });
            }
            _ => {}
        }
        let url = Url::parse(location).map_err(|e| wrong(format!("is no URL: {e}")))?;
        // Azure writes container@account; anywhere else this would be a user with a password.
        let secret = url.password().is_some() || !url.username().is_empty();
        if secret && scheme != Scheme::Azure {
            let shown = format!(
                "{}://…@{}",
                url.scheme(),
                url.host_str().unwrap_or_default()
            );
            return Err(StoreError::Location {
                location: shown,
                reason:
                    "user and password do not belong into a location; see the README for where \
                         credentials come from"
                        .into(),
            });
        }
        let place = url[url::Position::BeforeUsername..url::Position::AfterPort].to_owned();
        if place.is_empty() {
            return Err(wrong(format!("names no bucket; {UNDERSTOOD}")));
        }
        let prefix = Path::from_url_path(url.path()).map_err(|e| wrong(e.to_string()))?;
        Ok(Location {
            scheme,
            settings: settings(&url, scheme).map_err(wrong)?,
            place,
            prefix,
            shown: bare.trim_end_matches('/').to_owned(),
        })
    }

    fn folder(path: &str) -> Self {
        Location {
            scheme: Scheme::Folder,
            place: String::new(),
            prefix: Path::default(),
            shown: path.to_owned(),
            settings: BTreeMap::new(),
        }
    }

    pub(super) fn wrong(&self, reason: impl Into<String>) -> StoreError {
        StoreError::Location {
            location: self.shown.clone(),
            reason: reason.into(),
        }
    }

    /// The setting `name`, where it is one of true and false.
    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, StoreError> {
        let given = self.settings.get(name);
        given
            .map(|value| match value.as_str() {
                "true" => Ok(true),
                "false" => Ok(false),
                _ => Err(self.wrong(format!("{name}={value}: must be true or false"))),
            })
            .transpose()
    }

    /// The setting `name`, where it is a number of seconds.
    pub(super) fn seconds(&self, name: &str) -> Result<Option<std::time::Duration>, StoreError> {
        let given = self.settings.get(name);
        given
            .map(|value| match value.parse() {
                Ok(seconds @ 1..=3600) => Ok(std::time::Duration::from_secs(seconds)),
                _ => Err(self.wrong(format!("{name}={value}: must lie in 1..=3600"))),
            })
            .transpose()
    }
}

fn settings(url: &Url, scheme: Scheme) -> Result<BTreeMap<String, String>, String> {
    let known = scheme.settings();
    let mut settings = BTreeMap::new();
    for (name, value) in url.query_pairs() {
        if !known.contains(&&*name) {
            // Its value may be a secret, for instance a signature.
            let known = known.join(", ");
            return Err(format!("unknown setting `{name}`; there are {known}"));
        }
        settings.insert(name.into_owned(), value.into_owned());
    }
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(location: &str) -> String {
        Location::parse(location)
            .expect_err("is refused")
            .to_string()
    }

    #[test]
    fn locations_are_taken_apart() {
        let of = |location: &str| Location::parse(location).expect("is understood");
        let s3 = of("s3a://bucket/a/b%20c/?region=eu-west-1&endpoint=http://127.0.0.1:9000");
        assert_eq!(s3.scheme, Scheme::S3);
        assert_eq!((&*s3.place, s3.prefix.as_ref()), ("bucket", "a/b c"));
        assert_eq!(s3.shown, "s3a://bucket/a/b%20c");
        assert_eq!(s3.settings["endpoint"], "http://127.0.0.1:9000");
        let gcs = of("gs://bucket");
        assert_eq!((gcs.scheme, gcs.prefix.as_ref()), (Scheme::Gcs, ""));
        let azure = of("abfss://files@account.dfs.core.windows.net/x");
        assert_eq!(azure.scheme, Scheme::Azure);
        assert_eq!(azure.place, "files@account.dfs.core.windows.net");
        let http = of("https://host:8443/data/coco/");
        assert_eq!(
            (&*http.place, http.prefix.as_ref()),
            ("host:8443", "data/coco")
        );
        assert_eq!(of("file:///data").shown, "/data");
        assert_eq!(of("some/folder").scheme, Scheme::Folder);
    }

    #[test]
    fn what_is_wrong_is_named_and_secrets_are_not_repeated() {
        assert!(refused("ftp://host/x").contains("ftp://host/x: unknown scheme"));
        assert!(refused("s3:///prefix").contains("names no bucket"));
        let user = refused("https://someone:hush@host/x");
        assert!(
            user.contains("https://…@host") && !user.contains("hush"),
            "{user}"
        );
        let signed = refused("https://host/x?sig=hush");
        assert!(signed.contains("unknown setting `sig`"), "{signed}");
        assert!(!signed.contains("hush"), "{signed}");
        let odd = Location::parse("s3://b?anonymous=perhaps").expect("is understood");
        let odd = odd.flag("anonymous").expect_err("is refused").to_string();
        assert!(
            odd.contains("anonymous=perhaps: must be true or false"),
            "{odd}"
        );
    }
}
