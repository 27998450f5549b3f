//! The rest of a basebackup while a server runs on it: when it begins to come, and what is told of it.
//!
//! The work is `mount::upper::hydrate`'s. Here it gets a task, which ends before the server is stopped, so that a stop
//! has the store and the disk for itself. How far a clone's came is written into its folder, for when nobody answers.

use std::num::NonZeroU64;

use futures::poll;
use tokio::task::{JoinError, JoinSet};

use crate::control::{HydrationState, HydrationStatus};
use crate::instance::clone_folder::{CloneFolder, CloneSpec, LastHydration};
use crate::instance::lazy_uppers::LazyUppers;
use crate::mount::upper::hydrate::{self, HydrationReport};

/// The hydrator of a server that runs.
#[derive(Debug, Default)]
pub(super) struct Hydrating {
    task: JoinSet<()>,
    has_begun: bool,
}

impl Hydrating {
    /// Lets the hydrator begin, once.
    pub(super) fn begin(&mut self, mount: &LazyUppers) {
        if !self.has_begun {
            self.task.spawn(mount.hydrate());
            self.has_begun = true;
        }
    }

    /// Lets one that has failed go over everything again: what kept it may have been put right, without the server's being
    /// stopped for that. Whoever asks afterwards is told that it is at work.
    pub(super) async fn begin_again(&mut self, mount: &LazyUppers) {
        if !self.has_begun || mount.hydration().state != HydrationState::Failed {
            return;
        }
        // What has failed has ended, or is about to.
        self.stop().await;
        mount.forget_damage();
        let mut work = Box::pin(mount.hydrate());
        // It says that it begins when it is asked for the first time, and its task may come to that late.
        if poll!(&mut work).is_pending() {
            self.task.spawn(work);
        }
    }

    /// Tells whether it has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Waits until the hydrator comes to its end; nothing where none works.
    pub(super) async fn ended(&mut self) -> Option<Result<(), JoinError>> {
        self.task.join_next().await
    }

    /// Ends the hydrator, wherever it is.
    pub(super) async fn stop(&mut self) {
        self.task.shutdown().await;
    }
}

/// Writes down how far the hydrator came; `ended` is how its task did, if it has.
pub(super) fn remember(folder: &CloneFolder, mount: &LazyUppers, ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!("the hydrator ended: {error}");
    }
    if let Err(error) = folder.write_hydration(&mount.last_hydration()) {
        tracing::warn!("{error}");
    }
}

/// Returns what is told of a hydrator.
pub(super) fn status_of(report: HydrationReport, rate: Option<NonZeroU64>) -> HydrationStatus {
    HydrationStatus {
        state: match report.state {
            hydrate::HydrationState::Off => HydrationState::Off,
            hydrate::HydrationState::Waiting => HydrationState::Waiting,
            hydrate::HydrationState::Running => HydrationState::Running,
            hydrate::HydrationState::Done => HydrationState::Done,
            hydrate::HydrationState::Failed => HydrationState::Failed,
        },
        reason: report.reason,
        rate_limit: rate.map(NonZeroU64::get),
        bytes_per_second: report.bytes_per_second,
        seconds_left: report.seconds_left,
        failed_files: report.failed_files,
    }
}

/// Returns what is told of a clone that does not run.
pub(super) fn resting_status(spec: &CloneSpec, last: &LastHydration) -> HydrationStatus {
    let (state, reason) = match (last.is_done, spec.hydrate.in_background) {
        (true, _) => (HydrationState::Done, None),
        (false, true) => (HydrationState::Waiting, Some("the clone does not run".to_owned())),
        (false, false) => (HydrationState::Off, None),
    };
    let rate_limit = spec.hydrate.rate.map(NonZeroU64::get);
    HydrationStatus { state, reason, rate_limit, ..HydrationStatus::default() }
}
