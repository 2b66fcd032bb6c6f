//! The roles that run as processes of their own: coordinator and worker.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use belfry_configs::{Timeouts, ValidConfig};
use belfry_coordinator::{
    Candidacy, Candidate, CoordinatorError, Outcome, ServeOptions, lead, run_id, serve,
};
use belfry_worker::{Injection, Whereabouts, WorkerOptions};
use clap::Args;
use shard_tools::store::{Root, StoreError};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tracing_subscriber::fmt;

use crate::files::replace;
use crate::resolve;
use tracing_subscriber::prelude::*;

/// What every role is told.
#[derive(Args)]
pub struct Common {
    /// The run file, or a run's resolved run.toml.
    config: PathBuf,
    /// Folder or s3:// URL of the run.
    #[arg(long)]
    root: String,
    /// Override a key; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Write JSON lines here besides the human log on standard error.
    #[arg(long)]
    log: Option<PathBuf>,
    /// End when standard input closes: the launcher holds the other end.
    #[arg(long, hide = true)]
    follow_stdin: bool,
}

/// Arguments of `belfry coordinator`.
#[derive(Args)]
pub struct CoordinatorArguments {
    #[command(flatten)]
    common: Common,
    /// Where to listen; port 0 takes any.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
    /// Where workers reach this coordinator when that is not --listen: HOST:PORT, or HOST with the
    /// port that is listened on.
    #[arg(long, value_name = "HOST[:PORT]")]
    advertise: Option<String>,
    /// Write `host:port` here once leading. Workers find the leader by the run's root too.
    #[arg(long)]
    address_file: Option<PathBuf>,
    /// Wait while another coordinator leads; take over when it ends or its lease runs out (half of
    /// cluster.max_stall_seconds without a journal entry).
    #[arg(long)]
    standby: bool,
    /// This coordinator's own name, the same after a restart: a standby need not wait for the lease of
    /// a leader of its own name, because it has taken that one's place.
    #[arg(long, default_value = "")]
    name: String,
    /// Wait for so many workers before the first step.
    #[arg(long)]
    workers: Option<u32>,
}

/// Arguments of `belfry worker`.
#[derive(Args)]
pub struct WorkerArguments {
    #[command(flatten)]
    common: Common,
    /// Holds the coordinator's `host:port`, read again at every connection; without it the newest
    /// entry of the run's journal tells.
    #[arg(long)]
    address_file: Option<PathBuf>,
    /// A number that is this worker's own in the run and stays over restarts.
    #[arg(long)]
    id: u64,
    /// Address at which the other workers reach this one.
    #[arg(long, default_value = "127.0.0.1")]
    bind: IpAddr,
    /// Folder of this host's shard cache.
    #[arg(long)]
    cache: PathBuf,
    /// Flip one bit, for tests of who finds it.
    #[arg(long, hide = true)]
    inject: Option<Injection>,
}

impl Common {
    async fn open(
        &self,
        open: impl FnOnce(&str) -> Result<Root, StoreError>,
    ) -> anyhow::Result<(ValidConfig, Root, String)> {
        start_log(self.log.as_deref())?;
        let config = belfry_configs::load(&self.config, &self.settings)?;
        let root = open(&self.root)?;
        let config = resolve::together(config, &root).await?;
        let id = run_id(&config, &root.to_string());
        Ok((config, root, id))
    }
}

/// Resolves when this process is asked to end: by a signal, or by its launcher's end.
pub async fn shutdown(follow_stdin: bool) {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .expect("the signal exists");
    let closed = async {
        if !follow_stdin {
            std::future::pending::<()>().await;
        }
        let mut bytes = [0u8; 64];
        while matches!(tokio::io::stdin().read(&mut bytes).await, Ok(n) if n > 0) {}
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c(), if !follow_stdin => {}
        () = closed => {}
    }
}

/// Human lines on standard error, JSON lines in `file`.
pub fn start_log(file: Option<&Path>) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let human = fmt::layer().with_writer(std::io::stderr).with_target(false);
    let json = file
        .map(|file| {
            let opened = std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(file);
            let file = opened.with_context(|| format!("cannot write {}", file.display()))?;
            anyhow::Ok(fmt::layer().json().with_writer(std::sync::Arc::new(file)))
        })
        .transpose()?;
    tracing_subscriber::registry()
        .with(filter)
        .with(human)
        .with(json)
        .init();
    Ok(())
}

/// A process ends that did nothing wrong: another goes on, or the same one when it is started again.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Aside(pub String);

/// Runs a coordinator until its run ends.
pub async fn coordinator(arguments: CoordinatorArguments) -> anyhow::Result<()> {
    let (config, root, run_id) = arguments.common.open(Root::open_once).await?;
    let listener = TcpListener::bind(&arguments.listen)
        .await
        .with_context(|| {
            format!(
                "cannot listen on {}; choose another --listen or free the port",
                arguments.listen
            )
        })?;
    let candidate = Candidate {
        address: advertised(listener.local_addr()?, arguments.advertise.as_deref())?,
        name: arguments.name,
        standby: arguments.standby,
    };
    let setting = Duration::from_secs_f64(config.cluster.max_stall_seconds);
    let shutdown = shutdown(arguments.common.follow_stdin);
    tokio::pin!(shutdown);
    let timeouts = Timeouts::new(setting);
    let candidacy = tokio::select! {
        candidacy = lead(&root, &candidate, &timeouts) => candidacy,
        () = &mut shutdown => bail!(Aside("asked to stop before it led".into())),
    };
    let journal = match aside(candidacy)? {
        Candidacy::Leads(journal) => *journal,
        Candidacy::Ended(outcome) => return ended(outcome),
    };
    if let Some(file) = &arguments.address_file {
        replace(file, &candidate.address)?;
    }
    let options = ServeOptions {
        config,
        root,
        listener,
        expected_workers: arguments.workers,
        run_id,
    };
    match aside(serve(options, journal, shutdown).await)? {
        Some(outcome) => ended(outcome),
        None => bail!(Aside("the coordinator was asked to stop".into())),
    }
}

fn ended(outcome: Outcome) -> anyhow::Result<()> {
    anyhow::ensure!(outcome.success, "{}", outcome.reason);
    Ok(())
}

/// Who is superseded did nothing wrong.
pub fn aside<T>(result: Result<T, CoordinatorError>) -> anyhow::Result<T> {
    result.map_err(|error| match error {
        CoordinatorError::Superseded { .. } => Aside(error.to_string()).into(),
        other => other.into(),
    })
}

/// The address that others are told.
pub fn advertised(listening: SocketAddr, advertise: Option<&str>) -> anyhow::Result<String> {
    let Some(advertise) = advertise else {
        if listening.ip().is_unspecified() {
            bail!(
                "--listen {listening} is no address that workers can reach: say which one is by \
                 --advertise HOST[:PORT]"
            );
        }
        return Ok(listening.to_string());
    };
    let port = advertise.rsplit_once(':').map(|(_, port)| port);
    let (numeric, bracketed) = (
        port.is_some_and(|p| p.parse::<u16>().is_ok()),
        advertise.ends_with(']'),
    );
    if numeric && !bracketed {
        return Ok(advertise.to_owned());
    }
    if advertise.is_empty() || (port.is_some() && !bracketed) {
        bail!("--advertise {advertise}: expected HOST or HOST:PORT");
    }
    Ok(format!("{advertise}:{}", listening.port()))
}

/// Runs a worker until its run ends.
pub async fn worker(arguments: WorkerArguments) -> anyhow::Result<()> {
    let (config, root, run_id) = arguments.common.open(Root::open).await?;
    let coordinator = match arguments.address_file {
        Some(file) => Whereabouts::File(file),
        None => Whereabouts::Journal(root.clone()),
    };
    let options = WorkerOptions {
        config,
        root,
        run_id,
        worker_id: arguments.id,
        coordinator,
        cache_dir: arguments.cache,
        bind: arguments.bind,
        inject: arguments.inject,
    };
    belfry_worker::run(options, shutdown(arguments.common.follow_stdin)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_told_an_address_that_they_can_reach() {
        let told = |listening: &str, advertise: Option<&str>| {
            let listening = listening.parse().expect("an address");
            advertised(listening, advertise).map_err(|e| e.to_string())
        };
        let own = "127.0.0.1:7000";
        assert_eq!(told(own, None).as_deref(), Ok(own));
        let refused = told("0.0.0.0:7000", None).expect_err("nobody reaches it");
        assert!(refused.contains("--advertise"), "{refused}");
        let any = "0.0.0.0:7000";
        for (advertise, expected) in [
            ("lead.example", "lead.example:7000"),
            ("lead.example:80", "lead.example:80"),
            ("[fd00::1]", "[fd00::1]:7000"),
            ("[fd00::1]:80", "[fd00::1]:80"),
        ] {
            assert_eq!(told(any, Some(advertise)).as_deref(), Ok(expected));
        }
        assert!(told(any, Some("host:http")).is_err());
        assert!(told(any, Some("")).is_err());
    }
}
