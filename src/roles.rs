//! The roles that run as processes of their own: coordinator and worker.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use belfry_configs::ValidConfig;
use belfry_coordinator::{ServeOptions, run_id, serve};
use belfry_worker::{Injection, WorkerOptions};
use clap::Args;
use shard_tools::store::Root;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tracing_subscriber::fmt;

use crate::files::replace;
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
    /// Write `host:port` here once listening.
    #[arg(long)]
    address_file: PathBuf,
    /// Wait for so many workers before the first step.
    #[arg(long)]
    workers: Option<u32>,
}

/// Arguments of `belfry worker`.
#[derive(Args)]
pub struct WorkerArguments {
    #[command(flatten)]
    common: Common,
    /// Holds the coordinator's `host:port`; read again at every connection.
    #[arg(long)]
    address_file: PathBuf,
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
    fn open(&self) -> anyhow::Result<(ValidConfig, Root, String)> {
        start_log(self.log.as_deref())?;
        let config = belfry_configs::load(&self.config, &self.settings)?;
        let root = Root::open(&self.root)?;
        let id = run_id(&config, &root.to_string());
        Ok((config, root, id))
    }

    async fn shutdown(follow_stdin: bool) {
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
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
}

/// Human lines on standard error, JSON lines in `file`.
fn start_log(file: Option<&Path>) -> anyhow::Result<()> {
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

/// Runs a coordinator until its run ends.
pub async fn coordinator(arguments: CoordinatorArguments) -> anyhow::Result<()> {
    let (config, root, run_id) = arguments.common.open()?;
    let listener = TcpListener::bind(&arguments.listen)
        .await
        .with_context(|| {
            format!(
                "cannot listen on {}; choose another --listen or free the port",
                arguments.listen
            )
        })?;
    replace(&arguments.address_file, &listener.local_addr()?.to_string())?;
    let options = ServeOptions {
        config,
        root,
        listener,
        expected_workers: arguments.workers,
        run_id,
    };
    let outcome = serve(options, Common::shutdown(arguments.common.follow_stdin)).await?;
    anyhow::ensure!(outcome.success, "{}", outcome.reason);
    Ok(())
}

/// Runs a worker until its run ends.
pub async fn worker(arguments: WorkerArguments) -> anyhow::Result<()> {
    let (config, root, run_id) = arguments.common.open()?;
    let options = WorkerOptions {
        config,
        root,
        run_id,
        worker_id: arguments.id,
        coordinator_address_file: arguments.address_file,
        cache_dir: arguments.cache,
        bind: arguments.bind,
        inject: arguments.inject,
    };
    belfry_worker::run(options, Common::shutdown(arguments.common.follow_stdin)).await?;
    Ok(())
}
