//! `walden wal receive`: WAL by streaming, in the foreground, until SIGTERM or SIGINT.
//!
//! It prints nothing: what there is to know stands in the log and in `receive.json` of the site's spool folder. After
//! the signal it keeps what has come, stores what it can within seconds and leaves the rest to its next start.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::clock::{Clock, SystemClock};
use crate::codec::SystemRandom;
use crate::config::{Config, Environment, KeyPurpose, SiteConfig, WalSource};
use crate::replication::ConnectOptions;
use crate::repo::{self, Repository, RepositoryOptions};
use crate::storage::Traffic;
use crate::wal::receive::{FREE_BYTES_MIN, OpenRepository, ReceiveOptions, run, spool_of};

use super::context::{Context, ENDING_MAX, THREADS_WAIT};
use super::error::CommandError;

/// How long receiving may take to end.
const GRACE: Duration = Duration::from_secs(4);
const _: () = assert!(GRACE.saturating_add(THREADS_WAIT).as_millis() < ENDING_MAX.as_millis());

/// Receives WAL by streaming until it is told to stop: wal = "receive"
#[derive(Debug, Args)]
#[command(
    after_help = "`walden daemon` does the same for all sites that receive. What is being done stands in \
                  spool/SITE/receive.json in the state folder."
)]
pub(super) struct WalReceive {}

impl WalReceive {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let site = context.site()?;
        if site.wal != WalSource::Receive {
            let message = format!("site \"{}\" does not receive WAL", site.name);
            return Err(
                CommandError::usage(message).hint("Set wal = \"receive\" in the site's configuration.")
            );
        }
        let (options, open) = Receiving::of(context, site)?.prepare()?;
        context.warn_of_missing_protection()?;
        let clock = context.clock();
        context.block_on_service(async {
            let stop = stop_on_signal()?;
            // A task of its own: where a disk hangs, what hangs with it is its thread and not this one.
            let receiving = tokio::spawn(run(options, open, clock, stop.clone()));
            tokio::select! {
                ended = receiving => {
                    Ok(ended.map_err(|error| repo::Error::Internal(error.to_string()))??)
                }
                () = overdue(stop) => {
                    tracing::warn!("ending at once, with something that hangs: what is not stored stays in the spool");
                    Ok(())
                }
            }
        })?
    }
}

/// Resolves when it was time to stop a while ago.
async fn overdue(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
    tokio::time::sleep(GRACE).await;
}

/// What it takes to turn the configuration of a site into what the engine takes, more than once.
pub(super) struct Receiving {
    config: Arc<Config>,
    site: SiteConfig,
    environment: Environment,
    traffic: Arc<Traffic>,
}

impl Receiving {
    pub(super) fn of(context: &Context, site: &SiteConfig) -> Result<Self, CommandError> {
        Ok(Self {
            config: Arc::new(context.config()?.clone()),
            site: site.clone(),
            environment: context.environment.clone(),
            traffic: context.traffic.clone(),
        })
    }

    /// Reads what the configuration names, and says what is wrong with it.
    pub(super) fn prepare(&self) -> Result<(ReceiveOptions, OpenRepository), CommandError> {
        let site = &self.site;
        if site.nodes.is_empty() {
            let message = format!("site \"{}\" has no server to receive from", site.name);
            return Err(
                CommandError::usage(message).hint("Set connection, or nodes, in the site's configuration.")
            );
        }
        let state = self.config.paths.open_state()?;
        let mut nodes = Vec::new();
        for node in &site.nodes {
            nodes.push(known_as(node.connect_options(&self.environment)?, &site.name)?);
        }
        let options = ReceiveOptions {
            nodes,
            data_directory: site.data_directory.clone(),
            slot: site.slot.clone(),
            acknowledge: site.acknowledge,
            spool: spool_of(&state.path, &site.name),
            owner: Some(state.owner),
            free_bytes_min: FREE_BYTES_MIN,
            compression: self.config.compression.wal,
        };
        Ok((options, self.repository_opener()?))
    }

    /// Returns how to open the repository again and again.
    fn repository_opener(&self) -> Result<OpenRepository, CommandError> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let (config, prefix, traffic) = (self.config.clone(), self.site.prefix.clone(), self.traffic.clone());
        let store = self.site.storage.open(&self.environment, traffic, clock.clone(), Duration::MAX)?;
        config.keyring(KeyPurpose::Write, Arc::new(SystemRandom))?;
        Ok(Arc::new(move || {
            let keyring = config
                .keyring(KeyPurpose::Write, Arc::new(SystemRandom))
                .map_err(|error| repo::Error::Internal(error.to_string()));
            let (store, site, clock) = (store.clone(), prefix.clone(), clock.clone());
            Box::pin(async move {
                let options = RepositoryOptions { store, site, keyring: keyring?, clock };
                Ok(Repository::open_or_create(options).await?.0)
            })
        }))
    }
}

/// Sets the name that synchronous_standby_names would hold, unless the connection has one of its own.
fn known_as(options: ConnectOptions, site: &str) -> Result<ConnectOptions, CommandError> {
    let name = format!("walden_{site}");
    Ok(options.with("fallback_application_name", &name)?)
}

/// Returns what turns true at the first SIGTERM or SIGINT.
fn stop_on_signal() -> Result<watch::Receiver<bool>, CommandError> {
    let listen = |kind| {
        signal(kind).map_err(|error| CommandError::failed(format!("could not listen for signals: {error}")))
    };
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("told to stop");
        stop.send_replace(true);
        // Dropping the sender would look like another change to those who wait for one.
        std::future::pending::<()>().await;
    });
    Ok(stopped)
}
