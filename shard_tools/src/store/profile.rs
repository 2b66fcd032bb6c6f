//! `~/.aws/config` and `~/.aws/credentials`: one profile of them. Pure but for reading two files.
//!
//! It knows what profiles say and nothing of how S3 is reached.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ini::{Ini, ParseOption};

use super::environment::Environment;

/// A profile file longer than this is something else.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The keys of one profile; those of the credentials file stand over those of the config file.
#[derive(Default, PartialEq)]
pub(super) struct Profile {
    pub(super) name: String,
    keys: BTreeMap<String, String>,
}

/// The texts of the two files; empty where there is none.
#[derive(Default)]
pub(super) struct Files {
    pub(super) config: String,
    pub(super) credentials: String,
}

impl Files {
    /// Reads the files that `environment` names, or those in the home folder.
    ///
    /// # Errors
    /// Which file cannot be read, and why. A missing file in the home folder is none.
    pub(super) fn read(environment: &Environment) -> Result<Self, String> {
        let read = |variable: &str, usual: &str| {
            let named = environment.get(variable).map(PathBuf::from);
            let at_home = environment.home().map(|home| home.join(".aws").join(usual));
            let must_be = named.is_some();
            let Some(file) = named.or(at_home) else {
                return Ok(String::new());
            };
            let wrong = |reason: String| format!("{variable}: {}: {reason}", file.display());
            match std::fs::metadata(&file) {
                Ok(meta) if meta.len() > FILE_BYTES_MAX => {
                    return Err(wrong(format!("is longer than {FILE_BYTES_MAX} bytes")));
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && !must_be => {
                    return Ok(String::new());
                }
                _ => {}
            }
            std::fs::read_to_string(&file).map_err(|e| wrong(e.to_string()))
        };
        Ok(Files {
            config: read("AWS_CONFIG_FILE", "config")?,
            credentials: read("AWS_SHARED_CREDENTIALS_FILE", "credentials")?,
        })
    }
}

impl Profile {
    /// The profile that `asked` or `AWS_PROFILE` names, else `default`.
    ///
    /// # Errors
    /// What is wrong: a file that cannot be parsed, or a named profile that stands in neither.
    pub(super) fn choose(
        files: &Files,
        environment: &Environment,
        asked: Option<&str>,
    ) -> Result<Self, String> {
        let named = asked.or_else(|| environment.get("AWS_PROFILE"));
        let name = named.unwrap_or("default").to_owned();
        let config = parse(&files.config, "AWS's config file")?;
        let credentials = parse(&files.credentials, "AWS's credentials file")?;
        let title = format!("profile {name}");
        // In the config file only `default` may do without the word `profile`.
        let plain = config.section(Some(&name)).filter(|_| name == "default");
        let from_config = config.section(Some(&title)).or(plain);
        let from_credentials = credentials.section(Some(&name));
        if named.is_some() && from_config.is_none() && from_credentials.is_none() {
            let known = known(&config, &credentials);
            return Err(format!("AWS profile `{name}` does not exist; {known}"));
        }
        let mut keys = BTreeMap::new();
        for section in [from_config, from_credentials].into_iter().flatten() {
            let pairs = section.iter();
            keys.extend(pairs.map(|(k, v)| (k.to_ascii_lowercase(), v.trim().to_owned())));
        }
        Ok(Profile { name, keys })
    }

    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let value = self.keys.get(key).map(String::as_str);
        value.filter(|value| !value.is_empty())
    }
}

fn parse(text: &str, file: &str) -> Result<Ini, String> {
    let options = ParseOption {
        enabled_quote: false,
        enabled_escape: false,
        ..ParseOption::default()
    };
    // The parser's own message would repeat a line, which may be a secret.
    Ini::load_from_str_opt(text, options)
        .map_err(|e| format!("{file}: line {}: is not `key = value`", e.line + 1))
}

fn known(config: &Ini, credentials: &Ini) -> String {
    let of_config = config.sections().flatten();
    let of_config = of_config.map(|title| title.strip_prefix("profile ").unwrap_or(title));
    let mut names: Vec<&str> = of_config
        .chain(credentials.sections().flatten())
        .filter(|name| !name.contains(' '))
        .collect();
    names.sort_unstable();
    names.dedup();
    match names[..] {
        [] => "there is no profile in ~/.aws/config and ~/.aws/credentials".into(),
        _ => format!("there are {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "\
# written by hand
[default]
region = eu-central-1

[profile work]
region=us-west-2
endpoint_url = https://minio.example:9000
s3 =
    addressing_style = virtual
output = json
; with a program
[profile process]
credential_process = /opt/keys --format \"json\" --for a;b

[services other]
s3 =
  endpoint_url = https://elsewhere.example
";
    const CREDENTIALS: &str = "\
[default]
aws_access_key_id = ONE
aws_secret_access_key = a/b+c=#d\\n;e

[work]
aws_access_key_id=TWO
aws_secret_access_key=two
aws_session_token=token==
";

    fn files() -> Files {
        Files {
            config: CONFIG.into(),
            credentials: CREDENTIALS.into(),
        }
    }

    fn chosen(variables: &[(&str, &str)], asked: Option<&str>) -> Result<Profile, String> {
        Profile::choose(&files(), &Environment::of(variables, None), asked)
    }

    #[test]
    fn both_files_are_read_and_the_right_profile_is_chosen() {
        let default = chosen(&[], None).expect("is there");
        assert_eq!(default.get("region"), Some("eu-central-1"));
        assert_eq!(default.get("aws_access_key_id"), Some("ONE"));
        assert_eq!(default.get("aws_secret_access_key"), Some("a/b+c=#d\\n;e"));
        let work = chosen(&[("AWS_PROFILE", "work")], None).expect("is there");
        assert_eq!(work.get("region"), Some("us-west-2"));
        assert_eq!(work.get("endpoint_url"), Some("https://minio.example:9000"));
        assert_eq!(work.get("addressing_style"), Some("virtual"));
        assert_eq!(work.get("aws_session_token"), Some("token=="));
        let process = chosen(&[("AWS_PROFILE", "work")], Some("process")).expect("is there");
        assert_eq!(
            process.get("credential_process"),
            Some("/opt/keys --format \"json\" --for a;b")
        );
        let nothing = Profile::choose(&Files::default(), &Environment::default(), None);
        assert!(nothing.expect("may be missing").keys.is_empty());
    }

    #[test]
    fn a_missing_profile_and_a_bad_line_are_named_without_secrets() {
        let missing = chosen(&[("AWS_PROFILE", "wrok")], None)
            .err()
            .expect("is refused");
        assert_eq!(
            missing,
            "AWS profile `wrok` does not exist; there are default, process, work"
        );
        let files = Files {
            credentials: "[default]\naws_access_key_id = A\nhush\n".into(),
            ..Files::default()
        };
        let bad = Profile::choose(&files, &Environment::default(), None);
        let bad = bad.err().expect("is refused");
        assert!(bad.starts_with("AWS's credentials file: line "), "{bad}");
        assert!(!bad.contains("hush"), "{bad}");
    }

    #[test]
    fn files_are_those_of_the_environment_or_the_home_folder() {
        let home = tempfile::tempdir().expect("a folder");
        let none = Files::read(&Environment::of(&[], Some(home.path()))).expect("may be missing");
        assert!(none.config.is_empty() && none.credentials.is_empty());
        std::fs::create_dir(home.path().join(".aws")).expect("is made");
        std::fs::write(home.path().join(".aws/credentials"), CREDENTIALS).expect("is written");
        let other = home.path().join("other").display().to_string();
        std::fs::write(&other, CONFIG).expect("is written");
        let variables = [("AWS_CONFIG_FILE", &*other)];
        let files = Files::read(&Environment::of(&variables, Some(home.path())));
        let files = files.expect("are read");
        assert_eq!((&*files.config, &*files.credentials), (CONFIG, CREDENTIALS));
        let gone = [("AWS_CONFIG_FILE", "/no/such/file")];
        let gone = Files::read(&Environment::of(&gone, None))
            .err()
            .expect("is refused");
        assert!(gone.contains("AWS_CONFIG_FILE: /no/such/file"), "{gone}");
    }
}
