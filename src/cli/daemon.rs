//! `walden daemon`: one process in the foreground that archives for every site of the configuration.
//!
//! Here its options are made from the configuration, and its failures into those of commands; what it does is
//! `daemon`'s.

use std::fmt::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use futures::FutureExt;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::clock::{Clock, SystemClock};
use crate::codec::SystemRandom;
use crate::config::{Config, Environment, KeyPurpose, SiteConfig, WalSource};
use crate::control::{Destination, Failure};
use crate::daemon::{self, DaemonOptions, OpenRepository, PrepareReceiving, SiteOptions};
use crate::repo::{Repository, RepositoryOptions};
use crate::storage::Traffic;
use crate::wal;
use crate::wal::head_notes::HeadNotes;

use super::context::{Context, ENDING_MAX, THREADS_WAIT};
use super::error::CommandError;
use super::exit::ExitKind;
use super::output::Report;
use super::text::TextStyle;
use super::wal_receive::Receiving;

/// Archives WAL for all sites of the configuration, until it is told to end
#[derive(Debug, Args)]
#[command(
    after_help = "Stays in the foreground. `walden wal push` finds it by [paths] run, and archives by itself \
                  where there is none. SIGTERM and SIGINT end it within 5 seconds."
)]
pub struct Daemon {}

/// The socket, below `[paths] run`.
const SOCKET: &str = "daemon.sock";
/// The lock that says whether there is a daemon, beside it.
const LOCK: &str = "daemon.lock";
const _: () = assert!(daemon::ENDS_WITHIN.saturating_add(THREADS_WAIT).as_millis() < ENDING_MAX.as_millis());
/// The share of `[limits] memory` that WAL on its way may take; the rest is for what sealing takes for moments.
const WAL_SHARE: u64 = 2;

/// What `daemon` prints once it listens.
#[derive(Debug, Serialize)]
struct DaemonReport {
    socket: PathBuf,
    process: u32,
    sites: Vec<String>,
}

/// Returns where a daemon listens.
pub(super) fn socket(config: &Config) -> PathBuf {
    config.paths.run.join(SOCKET)
}

/// Says where the WAL of a site goes by a configuration.
pub(super) fn destination(config: &Config, site: &SiteConfig) -> Destination {
    Destination {
        repository: format!("{} in {}", site.prefix, site.storage.address()),
        recipients: config.encryption.as_ref().map(|encryption| encryption.wal_recipients.clone()),
    }
}

impl Daemon {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let config = Arc::new(context.config()?.clone());
        if config.sites.is_empty() {
            return Err(CommandError::new(ExitKind::Configuration, "the configuration has no site"));
        }
        let run = config.paths.open_run()?;
        let mut sites = Vec::new();
        for site in config.sites.values() {
            sites.push(site_options(context, &config, site)?);
        }
        let options = DaemonOptions {
            socket: socket(&config),
            lock: run.path.join(LOCK),
            sites,
            threads: config.limits.threads,
            transfers: config.limits.transfers,
            memory_bytes: config.limits.memory_bytes / WAL_SHARE,
            clock: context.clock(),
            failure_of,
        };
        context.warn_of_missing_protection()?;
        context.block_on_service(async {
            let stop = stop_signals()?;
            let daemon = daemon::Daemon::start(options)?;
            context.output.print(&DaemonReport {
                socket: socket(&config),
                process: std::process::id(),
                sites: config.sites.keys().cloned().collect(),
            })?;
            daemon.run(stop).await;
            Ok(())
        })?
    }
}

impl Report for DaemonReport {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        writeln!(out, "Archiving for {} at {}.", self.sites.join(", "), self.socket.display())
    }
}

/// Listens to the signals that ask to end, at once; what is returned resolves when one has come.
fn stop_signals() -> Result<impl Future<Output = ()>, CommandError> {
    let listen = |kind| {
        signal(kind).map_err(|error| CommandError::failed(format!("could not listen to signals: {error}")))
    };
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn site_options(
    context: &Context,
    config: &Arc<Config>,
    site: &SiteConfig,
) -> Result<SiteOptions, CommandError> {
    let opening = Opening {
        config: config.clone(),
        site: site.clone(),
        environment: context.environment.clone(),
        traffic: context.traffic.clone(),
    };
    let opening = Arc::new(opening);
    let open: OpenRepository = Box::new(move || {
        let opening = opening.clone();
        async move { opening.open().await.map_err(|error| error.into_failure()) }.boxed()
    });
    let receive = match site.wal {
        WalSource::Push => None,
        WalSource::Receive => {
            let receiving = Receiving::of(context, site)?;
            let prepare = move || receiving.prepare().map_err(CommandError::into_failure);
            Some(Box::new(prepare) as PrepareReceiving)
        }
    };
    Ok(SiteOptions {
        name: site.name.clone(),
        data_directory: site.data_directory.clone(),
        destination: destination(config, site),
        head_notes: head_notes(config, site),
        compression: config.compression.wal,
        open,
        receive,
    })
}

/// Returns where it is remembered when heads of a site's archive were written; archiving goes on without them.
fn head_notes(config: &Config, site: &SiteConfig) -> Option<HeadNotes> {
    match config.paths.open_state() {
        Ok(state) => Some(HeadNotes::of(&state.path, state.owner, &site.name)),
        Err(error) => {
            tracing::warn!("how far archives reach is not noted in their stores: {error}");
            None
        }
    }
}

/// What it takes to open the repository of a site, again and again.
struct Opening {
    config: Arc<Config>,
    site: SiteConfig,
    environment: Environment,
    traffic: Arc<Traffic>,
}

impl Opening {
    async fn open(&self) -> Result<Repository, CommandError> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let storage = &self.site.storage;
        let store = storage.open(&self.environment, self.traffic.clone(), clock.clone(), Duration::MAX)?;
        let keyring = self.config.keyring(KeyPurpose::Write, Arc::new(SystemRandom))?;
        let options = RepositoryOptions { store, site: self.site.prefix.clone(), keyring, clock };
        let (repository, created) = Repository::open_or_create(options).await?;
        if created {
            tracing::warn!("created site \"{}\" in {}", self.site.prefix, self.site.storage.location);
        }
        Ok(repository)
    }
}

/// Returns what a command is told of an error.
fn failure_of(error: wal::Error) -> Failure {
    CommandError::from(error).into_failure()
}

impl CommandError {
    /// Returns what another process of ours turns into this error again.
    fn into_failure(self) -> Failure {
        Failure { kind: self.kind.name().to_owned(), message: self.message(), hint: self.hint }
    }
}

impl From<Failure> for CommandError {
    fn from(failure: Failure) -> Self {
        let kind = ExitKind::from_name(&failure.kind).unwrap_or(ExitKind::Failed);
        Self { hint: failure.hint, ..Self::new(kind, failure.message) }
    }
}

impl From<daemon::Error> for CommandError {
    fn from(error: daemon::Error) -> Self {
        match error {
            daemon::Error::Disk(error) => error.into(),
            daemon::Error::Socket(error) => error.into(),
            daemon::Error::Running(_) => Self::failed(error.to_string())
                .hint("One daemon works for all sites of a host; end it first, or name another [paths] run."),
        }
    }
}
