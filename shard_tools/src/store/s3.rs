//! S3 and what speaks its protocol: settings and credentials from URL, environment and profile.
//!
//! [`settings`] is pure; the client is made of what it found. The order is the AWS SDKs': what the
//! location says, the environment's keys, the profile's, a web identity, a container's role, the
//! machine's role. Secrets are in no message and in no `Debug`.

use std::net::{TcpStream, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey as Key, S3ConditionalPut};
use object_store::{ClientOptions, RetryConfig};
use url::Url;

use super::environment::Environment;
use super::error::StoreError;
use super::location::Location;
use super::process::ProcessCredentials;
use super::profile::{Files, Profile};

/// Where a machine of AWS tells its role.
const METADATA_ENDPOINT: &str = "http://169.254.169.254";
/// It is on the machine itself or not there at all.
const METADATA_PATIENCE: Duration = Duration::from_secs(1);

/// Where keys come from.
#[derive(PartialEq)]
pub(super) enum Credentials {
    /// None are sent.
    Anonymous,
    Keys {
        id: String,
        secret: String,
        token: Option<String>,
    },
    /// A program prints them.
    Process(String),
    /// Web identity (EKS), or a container's role (ECS, EKS): the store client asks for them.
    Role,
    /// The machine's role, at this endpoint.
    Machine(String),
}

/// What the client is made of.
pub(super) struct Settings {
    pub(super) bucket: String,
    pub(super) credentials: Credentials,
    pub(super) endpoint: Option<String>,
    pub(super) virtual_hosted: bool,
    /// Anything else that the store client has a name for.
    pub(super) others: Vec<(Key, String)>,
}

/// # Errors
/// What is wrong with the environment or the profile, and what to do.
pub(super) fn settings(
    location: &Location,
    environment: &Environment,
    files: &Files,
) -> Result<Settings, StoreError> {
    let wrong = |reason: String| StoreError::Credentials {
        location: location.shown.clone(),
        reason,
    };
    let asked = location.settings.get("profile").map(String::as_str);
    let profile = Profile::choose(files, environment, asked).map_err(wrong)?;
    let given = |name: &str| location.settings.get(name).map(String::as_str);
    let credentials = match location.flag("anonymous")? {
        Some(true) => Credentials::Anonymous,
        None if environment.says("AWS_SKIP_SIGNATURE") => Credentials::Anonymous,
        _ => credentials(environment, &profile, asked.is_some()).map_err(wrong)?,
    };
    let endpoint = given("endpoint")
        .or_else(|| environment.get("AWS_ENDPOINT_URL_S3"))
        .or_else(|| environment.get("AWS_ENDPOINT_URL"))
        .or_else(|| environment.get("AWS_ENDPOINT"))
        .or_else(|| profile.get("endpoint_url"));
    let virtual_hosted = location.flag("virtual_hosted")?.unwrap_or_else(|| {
        environment.says("AWS_VIRTUAL_HOSTED_STYLE_REQUEST")
            || profile.get("addressing_style") == Some("virtual")
    });
    let mut others = others(environment, &profile);
    let region = given("region")
        .or_else(|| environment.get("AWS_REGION"))
        .or_else(|| environment.get("AWS_DEFAULT_REGION"))
        .or_else(|| profile.get("region"));
    others.extend(region.map(|region| (Key::Region, region.to_owned())));
    if let Some(pays) = location.flag("requester_pays")? {
        others.push((Key::RequestPayer, pays.to_string()));
    }
    let bucket = &location.place;
    Ok(Settings {
        bucket: bucket.clone(),
        credentials,
        endpoint: endpoint.map(|e| addressed(e, bucket, virtual_hosted)),
        virtual_hosted,
        others,
    })
}

/// With a custom endpoint the store client expects a virtual host's bucket in it.
fn addressed(endpoint: &str, bucket: &str, virtual_hosted: bool) -> String {
    let endpoint = endpoint.trim_end_matches('/');
    let begins = |(scheme, host): (&str, &str)| {
        let there = host.starts_with(&format!("{bucket}."));
        (virtual_hosted && !there).then(|| format!("{scheme}://{bucket}.{host}"))
    };
    let parts = endpoint.split_once("://");
    parts
        .and_then(begins)
        .unwrap_or_else(|| endpoint.to_owned())
}

fn credentials(
    environment: &Environment,
    profile: &Profile,
    profile_first: bool,
) -> Result<Credentials, String> {
    let of_environment = || {
        keys(
            environment.get("AWS_ACCESS_KEY_ID"),
            environment.get("AWS_SECRET_ACCESS_KEY"),
            environment.get("AWS_SESSION_TOKEN"),
            "the environment sets only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    };
    if !profile_first && let Some(keys) = of_environment()? {
        return Ok(keys);
    }
    if let Some(found) = of_profile(profile)? {
        return Ok(found);
    }
    let is_set = |name: &str| environment.get(name).is_some();
    let web_identity = is_set("AWS_WEB_IDENTITY_TOKEN_FILE") && is_set("AWS_ROLE_ARN");
    let in_profile = profile.get("web_identity_token_file").is_some();
    let container = is_set("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
        || is_set("AWS_CONTAINER_CREDENTIALS_FULL_URI");
    if web_identity || in_profile || container {
        return Ok(Credentials::Role);
    }
    if environment.says("AWS_EC2_METADATA_DISABLED") {
        return Err(none_found());
    }
    let endpoint = environment
        .get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
        .or_else(|| environment.get("AWS_METADATA_ENDPOINT"));
    Ok(Credentials::Machine(
        endpoint.unwrap_or(METADATA_ENDPOINT).to_owned(),
    ))
}

fn none_found() -> String {
    "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or for \
     a public bucket AWS_SKIP_SIGNATURE=true (or append ?anonymous=true)"
        .into()
}

fn of_profile(profile: &Profile) -> Result<Option<Credentials>, String> {
    let name = &profile.name;
    let found = keys(
        profile.get("aws_access_key_id"),
        profile.get("aws_secret_access_key"),
        profile.get("aws_session_token"),
        &format!("AWS profile `{name}` has only one of the two access keys"),
    )?;
    // A profile with both keys and a role uses the keys to take the role.
    let role =
        profile.get("role_arn").is_some() && profile.get("web_identity_token_file").is_none();
    let sign_on = profile.get("sso_session").or(profile.get("sso_start_url"));
    if role || (found.is_none() && sign_on.is_some()) {
        return Err(format!(
            "AWS profile `{name}` takes a role or signs on by the browser, which is left to AWS's \
             own tool: make a profile with `credential_process = aws configure export-credentials \
             --profile {name} --format process` and name that one"
        ));
    }
    let process = profile.get("credential_process");
    Ok(found.or_else(|| process.map(|command| Credentials::Process(command.to_owned()))))
}

fn keys(
    id: Option<&str>,
    secret: Option<&str>,
    token: Option<&str>,
    half: &str,
) -> Result<Option<Credentials>, String> {
    match (id, secret) {
        (Some(id), Some(secret)) => Ok(Some(Credentials::Keys {
            id: id.to_owned(),
            secret: secret.to_owned(),
            token: token.map(str::to_owned),
        })),
        (None, None) => Ok(None),
        _ => Err(half.to_owned()),
    }
}

/// What the store client knows by AWS's names and [`settings`] does not decide itself.
fn others(environment: &Environment, profile: &Profile) -> Vec<(Key, String)> {
    let mut others = Vec::new();
    let from_profile = [
        ("web_identity_token_file", Key::WebIdentityTokenFile),
        ("role_arn", Key::RoleArn),
        ("role_session_name", Key::RoleSessionName),
    ];
    for (name, key) in from_profile {
        others.extend(profile.get(name).map(|value| (key, value.to_owned())));
    }
    for (name, value) in environment.with_prefix("AWS_") {
        let decided = [
            Key::AccessKeyId,
            Key::SecretAccessKey,
            Key::Token,
            Key::Region,
            Key::DefaultRegion,
            Key::Bucket,
            Key::Endpoint,
            Key::S3Endpoint,
            Key::MetadataEndpoint,
            Key::SkipSignature,
            Key::VirtualHostedStyleRequest,
            Key::ConditionalPut,
        ];
        if let Ok(key) = name.parse::<Key>()
            && !decided.contains(&key)
        {
            others.push((key, value.to_owned()));
        }
    }
    others
}

/// The client. Asks nobody but, where nothing else gives keys, whether there is a machine's role.
///
/// # Errors
/// [`StoreError::Location`] or [`StoreError::Credentials`].
pub(super) fn open(
    location: &Location,
    settings: Settings,
    client: ClientOptions,
    retry: RetryConfig,
) -> Result<AmazonS3, StoreError> {
    let mut builder = AmazonS3Builder::new()
        .with_client_options(client)
        .with_retry(retry)
        .with_bucket_name(settings.bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_virtual_hosted_style_request(settings.virtual_hosted);
    for (key, value) in settings.others {
        builder = builder.with_config(key, value);
    }
    if let Some(endpoint) = settings.endpoint {
        builder = builder
            .with_allow_http(endpoint.starts_with("http://"))
            .with_endpoint(endpoint);
    }
    builder = match settings.credentials {
        Credentials::Anonymous => builder.with_skip_signature(true),
        Credentials::Keys { id, secret, token } => {
            let builder = builder
                .with_access_key_id(id)
                .with_secret_access_key(secret);
            match token {
                Some(token) => builder.with_token(token),
                None => builder,
            }
        }
        Credentials::Process(command) => {
            builder.with_credentials(Arc::new(ProcessCredentials::new(&command)))
        }
        Credentials::Role => builder,
        Credentials::Machine(endpoint) => {
            if !answers(&endpoint) {
                return Err(StoreError::Credentials {
                    location: location.shown.clone(),
                    reason: none_found(),
                });
            }
            builder.with_metadata_endpoint(endpoint)
        }
    };
    builder.build().map_err(|e| location.wrong(e.to_string()))
}

/// Whether someone listens there. Without this, a machine that is none of AWS's would ask for a role
/// until every request's patience ends.
fn answers(endpoint: &str) -> bool {
    let Ok(url) = Url::parse(endpoint) else {
        return false;
    };
    let addresses = url.socket_addrs(|| Some(80)).unwrap_or_default();
    let mut addresses = addresses.iter().flat_map(|a| a.to_socket_addrs()).flatten();
    addresses.any(|a| TcpStream::connect_timeout(&a, METADATA_PATIENCE).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "\
[default]
region = eu-central-1
[profile machine]
region = sa-east-1
[profile role]
role_arn = arn:aws:iam::1:role/x
source_profile = default
[profile web]
role_arn = arn:aws:iam::1:role/x
web_identity_token_file = /token
[profile sso]
sso_session = work
[profile process]
credential_process = print-keys
[profile near]
aws_access_key_id = NEAR
aws_secret_access_key = near
endpoint_url = https://near.example
s3 =
  addressing_style = virtual
[profile half]
aws_access_key_id = HALF
";

    fn found(url: &str, variables: &[(&str, &str)]) -> Result<Settings, StoreError> {
        let files = Files {
            config: CONFIG.into(),
            credentials: "[default]\naws_access_key_id = HOME\naws_secret_access_key = home\n"
                .into(),
        };
        let location = Location::parse(url).expect("is understood");
        settings(&location, &Environment::of(variables, None), &files)
    }

    fn key_id(settings: &Settings) -> &str {
        match &settings.credentials {
            Credentials::Keys { id, .. } => id,
            Credentials::Anonymous => "anonymous",
            Credentials::Process(_) => "process",
            Credentials::Role => "role",
            Credentials::Machine(_) => "machine",
        }
    }

    fn other(settings: &Settings, key: Key) -> Option<&str> {
        let all = settings.others.iter().rev();
        all.filter(|(k, _)| *k == key).map(|(_, v)| &**v).next()
    }

    const KEYS: [(&str, &str); 2] = [
        ("AWS_ACCESS_KEY_ID", "ENV"),
        ("AWS_SECRET_ACCESS_KEY", "env"),
    ];

    #[test]
    fn credentials_are_found_in_the_order_of_the_sdks() {
        let who = |url: &str, variables: &[(&str, &str)]| {
            key_id(&found(url, variables).expect("are found")).to_owned()
        };
        assert_eq!(who("s3://b/p", &[]), "HOME");
        assert_eq!(who("s3://b/p", &KEYS), "ENV");
        assert_eq!(who("s3://b/p", &[("AWS_PROFILE", "near")]), "NEAR");
        assert_eq!(
            who("s3://b/p", &[("AWS_PROFILE", "near"), KEYS[0], KEYS[1]]),
            "ENV"
        );
        assert_eq!(who("s3://b/p?profile=near", &KEYS), "NEAR");
        assert_eq!(who("s3://b/p?anonymous=true", &KEYS), "anonymous");
        let skip = ("AWS_SKIP_SIGNATURE", "true");
        assert_eq!(who("s3://b/p", &[skip, KEYS[0], KEYS[1]]), "anonymous");
        assert_eq!(who("s3://b/p?anonymous=false", &[skip]), "HOME");
        assert_eq!(who("s3://b/p?profile=process", &[]), "process");
        assert_eq!(who("s3://b/p?profile=web", &[]), "role");
        let machine = ("AWS_PROFILE", "machine");
        let ecs = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/x");
        assert_eq!(who("s3://b/p", &[machine, ecs]), "role");
        let eks = [
            machine,
            ("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"),
            ("AWS_ROLE_ARN", "arn"),
        ];
        assert_eq!(who("s3://b/p", &eks), "role");
        assert_eq!(who("s3://b/p", &[machine]), "machine");
    }

    #[test]
    fn what_cannot_work_is_refused_with_what_to_do() {
        let refused = |url: &str, variables: &[(&str, &str)]| {
            found(url, variables).err().expect("is refused").to_string()
        };
        let half = refused("s3://b/p", &KEYS[..1]);
        assert!(
            half.starts_with("s3://b/p: the environment sets only one of"),
            "{half}"
        );
        let half = refused("s3://b?profile=half", &[]);
        assert!(half.contains("`half` has only one of"), "{half}");
        for profile in ["role", "sso"] {
            let said = refused(&format!("s3://b?profile={profile}"), &[]);
            let todo = format!("aws configure export-credentials --profile {profile}");
            assert!(said.contains(&todo), "{said}");
        }
        let disabled = [
            ("AWS_PROFILE", "machine"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ];
        let none = refused("s3://b", &disabled);
        assert!(
            none.contains("no credentials found; set AWS_ACCESS_KEY_ID"),
            "{none}"
        );
        assert!(refused("s3://b", &[("AWS_PROFILE", "gone")]).contains("`gone` does not exist"));
    }

    #[test]
    fn region_endpoint_and_style_follow_the_nearest_word() {
        let plain = found("s3://b", &[]).expect("are found");
        assert_eq!(other(&plain, Key::Region), Some("eu-central-1"));
        assert_eq!(
            (plain.endpoint.as_deref(), plain.virtual_hosted),
            (None, false)
        );
        let near = found("s3://b?profile=near", &[]).expect("are found");
        assert_eq!(near.endpoint.as_deref(), Some("https://b.near.example"));
        let path = found("s3://b?profile=near&virtual_hosted=false", &[]).expect("are found");
        assert_eq!(path.endpoint.as_deref(), Some("https://near.example"));
        let general = ("AWS_ENDPOINT_URL", "http://one:9000/");
        let special = ("AWS_ENDPOINT_URL_S3", "http://two:9000");
        let region = ("AWS_REGION", "r1");
        let found = |url, variables: &[_]| found(url, variables).expect("are found");
        let of = found("s3://b", &[general, region]);
        assert_eq!(of.endpoint.as_deref(), Some("http://one:9000"));
        assert_eq!(other(&of, Key::Region), Some("r1"));
        let of = found("s3://b", &[general, special]);
        assert_eq!(of.endpoint.as_deref(), Some("http://two:9000"));
        let of = found(
            "s3://b?endpoint=https://three&region=r3&requester_pays=true",
            &[special],
        );
        assert_eq!(of.endpoint.as_deref(), Some("https://three"));
        assert_eq!(other(&of, Key::Region), Some("r3"));
        assert_eq!(other(&of, Key::RequestPayer), Some("true"));
    }

    #[test]
    fn a_client_is_made_without_asking_anybody_and_shows_no_secret() {
        let variables = [KEYS[0], ("AWS_SECRET_ACCESS_KEY", "hush")];
        let location = Location::parse("s3://b/p?endpoint=http://127.0.0.1:1").expect("is one");
        let environment = Environment::of(&variables, None);
        let settings = settings(&location, &environment, &Files::default()).expect("are found");
        let (client, retry) = (ClientOptions::new(), RetryConfig::default());
        let made = open(&location, settings, client, retry).expect("is made");
        assert!(!format!("{made:?}").contains("hush"));
    }

    #[test]
    fn without_credentials_and_without_a_machine_of_aws_nothing_hangs() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
        let free = listener.local_addr().expect("is bound");
        drop(listener);
        let endpoint = format!("http://{free}");
        let environment = [("AWS_EC2_METADATA_SERVICE_ENDPOINT", &*endpoint)];
        let environment = Environment::of(&environment, None);
        let location = Location::parse("s3://b").expect("is one");
        let settings = settings(&location, &environment, &Files::default()).expect("are found");
        let made = open(
            &location,
            settings,
            ClientOptions::new(),
            RetryConfig::default(),
        );
        let said = made.expect_err("is refused").to_string();
        assert!(said.contains("no credentials found"), "{said}");
    }
}
