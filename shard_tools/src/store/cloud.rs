//! Google Cloud Storage, Azure Blob Storage and plain web servers: the store clients' own settings,
//! from URL and environment.

use object_store::azure::{MicrosoftAzure, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorage, GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::{HttpBuilder, HttpStore};
use object_store::{ClientOptions, RetryConfig};

use super::environment::Environment;
use super::error::StoreError;
use super::location::Location;

/// `gs://bucket/prefix`. A service account's key or gcloud's default credentials, else the machine's.
///
/// # Errors
/// [`StoreError`], naming the location.
pub(super) fn google(
    location: &Location,
    environment: &Environment,
    client: ClientOptions,
    retry: RetryConfig,
) -> Result<GoogleCloudStorage, StoreError> {
    // Google's own endpoint is https; one that is given is taken as it is.
    let mut builder = GoogleCloudStorageBuilder::new()
        .with_client_options(client.with_allow_http(true))
        .with_retry(retry);
    for (name, value) in environment.with_prefix("GOOGLE_") {
        if let Ok(key) = name.parse::<GoogleConfigKey>() {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(endpoint) = location.settings.get("endpoint") {
        builder = builder.with_config(GoogleConfigKey::BaseUrl, endpoint);
    }
    if let Some(anonymous) = location.flag("anonymous")? {
        builder = builder.with_skip_signature(anonymous);
    }
    let made = builder.with_bucket_name(&location.place).build();
    made.map_err(|e| location.unusable(&e, "GOOGLE_APPLICATION_CREDENTIALS"))
}

/// `az://container/prefix` with the account from the environment or `?account=`, or
/// `abfss://container@account.dfs.core.windows.net/prefix`.
///
/// # Errors
/// [`StoreError`], naming the location.
pub(super) fn azure(
    location: &Location,
    environment: &Environment,
    client: ClientOptions,
    retry: RetryConfig,
) -> Result<MicrosoftAzure, StoreError> {
    let endpoint = location.settings.get("endpoint").map(String::as_str);
    let endpoint = endpoint.or_else(|| environment.get("AZURE_STORAGE_ENDPOINT"));
    let plain = endpoint.is_some_and(|e| e.starts_with("http://"));
    let mut builder = MicrosoftAzureBuilder::new()
        .with_client_options(client.with_allow_http(plain))
        .with_retry(retry);
    for (name, value) in environment.with_prefix("AZURE_") {
        // The name of Azure's own tools.
        let name = match name.as_str() {
            "azure_storage_account" => "azure_storage_account_name",
            "azure_storage_key" => "azure_storage_account_key",
            other => other,
        };
        if let Ok(key) = name.parse() {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(account) = location.settings.get("account") {
        builder = builder.with_account(account);
    }
    if let Some(endpoint) = endpoint {
        builder = builder.with_endpoint(endpoint.to_owned());
    }
    if let Some(anonymous) = location.flag("anonymous")? {
        builder = builder.with_skip_signature(anonymous);
    }
    let url = format!("abfss://{}", location.place);
    let made = builder.with_url(url).build();
    made.map_err(|e| location.unusable(&e, "AZURE_STORAGE_ACCOUNT_NAME"))
}

/// `http://` or `https://`: gets, ranges and heads. Ranges need a server that serves them.
///
/// # Errors
/// [`StoreError`], naming the location.
pub(super) fn http(
    location: &Location,
    client: ClientOptions,
    retry: RetryConfig,
) -> Result<HttpStore, StoreError> {
    let (scheme, _) = location.shown.split_once("://").unwrap_or_default();
    let made = HttpBuilder::new()
        .with_url(format!("{scheme}://{}", location.place))
        .with_client_options(client.with_allow_http(true))
        .with_retry(retry)
        .build();
    made.map_err(|e| location.wrong(e.to_string()))
}

impl Location {
    fn unusable(&self, error: &object_store::Error, variable: &str) -> StoreError {
        StoreError::Credentials {
            location: self.shown.clone(),
            reason: format!("{error}; check {variable}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A service account as the emulators of Google's store take it: no key, no sign-on.
    const ACCOUNT: &str = r#"{"gcs_base_url": "http://127.0.0.1:1", "disable_oauth": true,
        "client_email": "", "private_key": "hush", "private_key_id": ""}"#;

    fn defaults() -> (ClientOptions, RetryConfig) {
        (ClientOptions::new(), RetryConfig::default())
    }

    #[test]
    fn google_and_azure_are_made_of_their_own_variables_without_a_network() {
        let environment = Environment::of(
            &[
                ("GOOGLE_SERVICE_ACCOUNT_KEY", ACCOUNT),
                ("AZURE_STORAGE_ACCOUNT", "account"),
                ("AZURE_STORAGE_KEY", "aHVzaA=="),
            ],
            None,
        );
        let at = |url: &str| Location::parse(url).expect("is understood");
        let (client, retry) = defaults();
        let made = google(&at("gs://bucket/p"), &environment, client, retry).expect("is made");
        let made = format!("{made:?}");
        assert!(made.contains("bucket") && !made.contains("hush"), "{made}");
        let hadoop = "abfss://files@account.dfs.core.windows.net/p";
        for url in [
            "az://files/p",
            "az://files/p?endpoint=http://127.0.0.1:1",
            hadoop,
        ] {
            let (client, retry) = defaults();
            let made = azure(&at(url), &environment, client, retry).expect("is made");
            let made = format!("{made:?}");
            assert!(made.contains("files") && made.contains("account"), "{made}");
            assert!(!made.contains("aHVzaA"), "{made}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let location = Location::parse("az://files/p").expect("is understood");
        let (client, retry) = defaults();
        let none = azure(&location, &Environment::default(), client, retry);
        let none = none.expect_err("has no account").to_string();
        assert!(none.starts_with("az://files/p: "), "{none}");
        assert!(none.contains("check AZURE_STORAGE_ACCOUNT_NAME"), "{none}");
        let broken = [("GOOGLE_SERVICE_ACCOUNT_KEY", "{\"private_key\": \"hush\"")];
        let location = Location::parse("gs://bucket").expect("is understood");
        let (client, retry) = defaults();
        let broken = google(&location, &Environment::of(&broken, None), client, retry);
        let broken = broken.expect_err("is no account").to_string();
        assert!(
            broken.contains("check GOOGLE_APPLICATION_CREDENTIALS"),
            "{broken}"
        );
        assert!(!broken.contains("hush"), "{broken}");
    }
}
