//! `walden internal serve-clone`: the supervisor of one clone, started by `clone create` and `clone start`.
//! What was spent before it began is handed over as arguments, so that its figures are those of the whole.

use std::cell::Cell;
use std::pin::pin;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::{KeyPurpose, machine_memory};
use crate::control::CloneState;
use crate::instance::clone_folder::{CloneFolder, LastState};
use crate::instance::expiry::over;
use crate::instance::supervise::{SuperviseOptions, could_not_open, supervise};

use super::clone::{HandedOver, delete_over};
use super::context::Context;
use super::error::CommandError;
use super::exit::ExitKind;

/// Mounts a clone, runs its PostgreSQL and answers for it
#[derive(Debug, Args)]
pub(super) struct ServeClone {
    /// The name of the clone
    name: String,
    #[command(flatten)]
    spent: HandedOver,
}

impl ServeClone {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let (config, site) = (context.config()?, context.site()?);
        let folder = CloneFolder::new(&config.paths.clones, &self.name)
            .map_err(|error| CommandError::usage(error.to_string()))?;
        let now = context.clock().monotonic();
        let spent = Duration::try_from_secs_f64(self.spent.spent_seconds).unwrap_or_default();
        // A clone whose time is over ends like one that is told to, and is then deleted.
        let (watched, clock, is_over) = (folder.clone(), context.clock(), Cell::new(false));
        context.block_on(async {
            let told = terminated();
            let mut ends = pin!(async {
                tokio::select! {
                    () = told => {}
                    () = over(&watched, &*clock) => is_over.set(true),
                }
            });
            // Before the store is asked: meanwhile nobody else is to remove the clone, nor to make another of its name.
            let lock = folder.lock_to_work().await?;
            let opened = tokio::select! {
                opened = context.open_repository(site, KeyPurpose::Read) => opened,
                // Else what it ended of the last time would be told of this one.
                () = ends.as_mut() => return Ok(folder.write_state(&LastState::sound(CloneState::Stopped))?),
            };
            let repository = match opened {
                Ok(repository) => repository,
                Err(error) => {
                    let damaged = error.kind == ExitKind::Damaged;
                    if let Err(error) = could_not_open(&folder, &lock, error.error.as_ref(), damaged) {
                        tracing::warn!("{error}");
                    }
                    return Err(error);
                }
            };
            let options = SuperviseOptions {
                folder,
                repository,
                traffic: context.traffic.clone(),
                spent_requests: self.spent.spent_requests,
                spent_bytes: self.spent.spent_bytes,
                host_memory_bytes: machine_memory(),
                environment: context.environment.for_postgres(),
                asked_at: now.checked_sub(spent).unwrap_or(now),
            };
            supervise(options, &lock, ends).await.map_err(|error| CommandError::failed(error.to_string()))
        })??;
        if is_over.get() {
            delete_over(context, &watched)?;
        }
        Ok(())
    }
}

/// Listens from now on, and resolves when this process has been asked to end. Whoever only began to listen when it waits
/// would be killed by what comes before, with whatever it had mounted by then.
pub(super) fn terminated() -> impl Future<Output = ()> {
    let signals = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
    async move {
        let [Ok(mut terminate), Ok(mut interrupt)] = signals else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}
