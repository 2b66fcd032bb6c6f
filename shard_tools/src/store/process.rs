//! Credentials that a program of the user's prints: `credential_process` of an AWS profile.
//!
//! This is also the way to what Belfry does not do itself, single sign-on and assumed roles:
//! `credential_process = aws configure export-credentials --profile NAME --format process`.

use std::fmt;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AwsCredential;
use object_store::{CredentialProvider, Error};
use serde::Deserialize;
use tokio::process::Command;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// A program that hangs must not hang the run.
const RUN_TIME_MAX: Duration = Duration::from_secs(60);
/// Keys are asked for again this long before they end.
const MARGIN: Duration = Duration::from_secs(300);
/// Of a program that says nothing about their end: asked for again now and then all the same.
const LIFE_UNSAID: Duration = Duration::from_secs(3600);

/// Runs the program, and again when its keys are about to end.
pub(super) struct ProcessCredentials {
    command: String,
    held: Mutex<Option<(Instant, Arc<AwsCredential>)>>,
}

/// The command may carry secrets.
impl fmt::Debug for ProcessCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProcessCredentials")
    }
}

/// What the program prints (AWS's "Sourcing credentials with an external process", version 1).
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Printed {
    version: u32,
    access_key_id: String,
    secret_access_key: String,
    session_token: Option<String>,
    /// ISO 8601.
    expiration: Option<String>,
}

#[derive(Debug, thiserror::Error)]
#[error("credential_process of the AWS profile: {0}")]
struct Wrong(String);

fn wrong(reason: impl Into<String>) -> Error {
    Error::Unauthenticated {
        path: String::new(),
        source: Box::new(Wrong(reason.into())),
    }
}

impl ProcessCredentials {
    pub(super) fn new(command: &str) -> Self {
        ProcessCredentials {
            command: command.to_owned(),
            held: Mutex::default(),
        }
    }

    async fn run(&self) -> Result<(Instant, Arc<AwsCredential>), Error> {
        let begun = Instant::now();
        let run = Command::new("sh")
            .args(["-c", &self.command])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(RUN_TIME_MAX, run).await;
        let output = output
            .map_err(|_| wrong(format!("did not end within {} s", RUN_TIME_MAX.as_secs())))?
            .map_err(|e| wrong(format!("does not start: {e}")))?;
        if !output.status.success() {
            return Err(wrong(format!("ended with {}", output.status)));
        }
        // What it printed is never repeated.
        let printed: Printed = serde_json::from_slice(&output.stdout)
            .map_err(|e| wrong(format!("printed no credentials (line {})", e.line())))?;
        if printed.version != 1 {
            return Err(wrong(format!("printed version {}, not 1", printed.version)));
        }
        let life = match &printed.expiration {
            None => LIFE_UNSAID,
            Some(end) => remaining(end).ok_or_else(|| wrong("printed keys that have ended"))?,
        };
        let credential = AwsCredential {
            key_id: printed.access_key_id,
            secret_key: printed.secret_access_key,
            token: printed.session_token,
        };
        Ok((begun + life.saturating_sub(MARGIN), Arc::new(credential)))
    }
}

/// From now to `end`, if it lies ahead.
fn remaining(end: &str) -> Option<Duration> {
    let end = chrono::DateTime::parse_from_rfc3339(end).ok()?;
    (end.to_utc() - chrono::Utc::now()).to_std().ok()
}

#[async_trait::async_trait]
impl CredentialProvider for ProcessCredentials {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> Result<Arc<AwsCredential>, Error> {
        // Held over the run: many requests at once start one program.
        let mut held = self.held.lock().await;
        if let Some((until, credential)) = &*held
            && Instant::now() < *until
        {
            return Ok(Arc::clone(credential));
        }
        let (until, credential) = self.run().await?;
        *held = Some((until, Arc::clone(&credential)));
        Ok(credential)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printing(json: &str) -> ProcessCredentials {
        ProcessCredentials::new(&format!("echo '{json}'"))
    }

    #[tokio::test]
    async fn keys_are_read_kept_and_asked_for_again_before_they_end() {
        let folder = tempfile::tempdir().expect("a folder");
        let runs = folder.path().join("runs");
        let count = || {
            std::fs::read_to_string(&runs)
                .expect("is there")
                .lines()
                .count()
        };
        let with_end = |end: &str| {
            ProcessCredentials::new(&format!(
                "echo run >> {}; echo '{{\"Version\": 1, \"AccessKeyId\": \"A\", \
                 \"SecretAccessKey\": \"hush\", \"SessionToken\": \"t\"{end}}}'",
                runs.display()
            ))
        };
        let lasting = with_end("");
        for _ in 0..3 {
            let keys = lasting.get_credential().await.expect("are printed");
            assert_eq!((&*keys.key_id, &*keys.secret_key), ("A", "hush"));
            assert_eq!(keys.token.as_deref(), Some("t"));
        }
        assert_eq!(count(), 1);
        // Ends within the margin: good for this request, asked for again at the next.
        let soon = chrono::Utc::now() + chrono::TimeDelta::seconds(100);
        let ending = with_end(&format!(", \"Expiration\": \"{}\"", soon.to_rfc3339()));
        ending.get_credential().await.expect("are printed");
        ending.get_credential().await.expect("are printed");
        assert_eq!(count(), 3);
        let ended = with_end(", \"Expiration\": \"2020-01-01T00:00:00Z\"");
        let ended = ended.get_credential().await.expect_err("are no good");
        assert!(ended.to_string().contains("have ended"), "{ended}");
    }

    #[tokio::test]
    async fn a_program_that_fails_is_named_and_what_it_printed_is_not() {
        let refused = async |process: ProcessCredentials| {
            let error = process.get_credential().await.expect_err("is refused");
            assert!(matches!(error, Error::Unauthenticated { .. }), "{error}");
            error.to_string()
        };
        let failed = refused(ProcessCredentials::new("exit 3")).await;
        assert!(
            failed.contains("credential_process") && failed.contains('3'),
            "{failed}"
        );
        let nonsense = refused(printing("hush")).await;
        assert!(nonsense.contains("printed no credentials"), "{nonsense}");
        assert!(!nonsense.contains("hush"), "{nonsense}");
    }
}
