//! The trees that a server must always be able to read, on their way to being local: fetched beside it, and again where that failed.
//!
//! A failure says only that a read failed. While these trees come reads wait for the store for ever, so what fails all the
//! same is damaged, or has no room; unless the wait was cut off, as it is for a moment when a server ends. What is damaged is
//! fetched a few times and then left to the hydrator to tell; for everything else this goes on without end.

use std::time::Duration;

use nix::errno::Errno;
use tokio::task::{JoinError, JoinSet};

use crate::instance::lazy_uppers::{LazyUppers, MountFailure};

/// The work of fetching them.
#[derive(Debug, Default)]
pub(super) struct AlwaysRead {
    task: JoinSet<Result<(), MountFailure>>,
    failed: u32,
    was_cut_off: bool,
}

/// Between two attempts.
const AGAIN: Duration = Duration::from_secs(5);
/// What fails this often of damage stays damaged.
const FAILURES_MAX: u32 = 3;

impl AlwaysRead {
    /// Begins to fetch them.
    pub(super) fn begin(&mut self, mounts: &LazyUppers) {
        self.task.spawn(mounts.fetch_never_failing());
    }

    /// Begins anew where damage has ended it, which may have been put right.
    pub(super) fn begin_again(&mut self, mounts: &LazyUppers) {
        if self.is_over() && self.failed >= FAILURES_MAX {
            self.failed = 0;
            self.begin(mounts);
        }
    }

    /// Tells whether nothing of them is on its way any more.
    pub(super) fn is_over(&self) -> bool {
        self.task.is_empty()
    }

    /// Takes note that reads are told to wait no longer, for a moment.
    pub(super) fn cut_off(&mut self) {
        self.was_cut_off = true;
    }

    /// Waits until an attempt comes to its end; nothing where there is none.
    pub(super) async fn ended(&mut self) -> Option<Result<Result<(), MountFailure>, JoinError>> {
        self.task.join_next().await
    }

    /// Fetches again what could not be fetched, unless it is damaged for good.
    pub(super) fn was_fetched(&mut self, fetched: Result<(), MountFailure>, mounts: &LazyUppers) {
        let Err(error) = fetched else { return };
        tracing::error!("{error}");
        if self.is_for_good(&error, mounts.damage().is_some()) {
            return;
        }
        let fetch = mounts.fetch_never_failing();
        self.task.spawn(async move {
            tokio::time::sleep(AGAIN).await;
            fetch.await
        });
    }

    /// Counts a failure, and tells whether there have been enough; `has_met_damage` may be of any other file.
    fn is_for_good(&mut self, error: &MountFailure, has_met_damage: bool) -> bool {
        let was_cut_off = std::mem::take(&mut self.was_cut_off);
        let is_read_error = matches!(error, MountFailure::Fetch(Errno::EIO));
        self.failed += u32::from(has_met_damage && is_read_error && !was_cut_off);
        self.failed >= FAILURES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_damage_of_the_trees_themselves_ends_it() {
        let mut trees = AlwaysRead::default();
        let (unread, no_room) = (MountFailure::Fetch(Errno::EIO), MountFailure::Fetch(Errno::ENOSPC));
        for _ in 0..10 {
            assert!(!trees.is_for_good(&unread, false), "nothing is damaged");
            assert!(!trees.is_for_good(&no_room, true), "there may be room later");
            // A table is damaged, and a server has ended while the store was away.
            trees.cut_off();
            assert!(!trees.is_for_good(&unread, true), "it was told to wait no longer");
        }
        let ends = [(); 3].map(|()| trees.is_for_good(&unread, true));
        assert_eq!(ends, [false, false, true]);
    }
}
