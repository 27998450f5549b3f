//! What a daemon does without being asked: tasks that belong to a site and end with the daemon.
//!
//! A job keeps its own failures to itself: one that panics is an error in the log, and the others go on.

use std::future::Future;
use std::panic::AssertUnwindSafe;

use futures::FutureExt;
use tokio::task::JoinSet;

use super::shutdown::Shutdown;

/// The jobs of a daemon.
#[derive(Debug)]
pub(super) struct Jobs {
    tasks: JoinSet<()>,
    shutdown: Shutdown,
}

impl Jobs {
    pub(super) fn new(shutdown: Shutdown) -> Self {
        Self { tasks: JoinSet::new(), shutdown }
    }

    /// Starts a job of a site; it is dropped at the point where it waits when the daemon's end is wanted.
    pub(super) fn spawn(
        &mut self,
        site: &str,
        name: &'static str,
        job: impl Future<Output = ()> + Send + 'static,
    ) {
        let (site, shutdown) = (site.to_owned(), self.shutdown.clone());
        self.tasks.spawn(async move {
            let ended = tokio::select! {
                ended = AssertUnwindSafe(job).catch_unwind() => ended,
                () = shutdown.requested() => return,
            };
            if ended.is_err() {
                tracing::error!(
                    site,
                    "the job \"{name}\" panicked and has ended; the daemon goes on without it"
                );
            }
        });
    }

    /// Ends all of them.
    pub(super) fn end(mut self) {
        self.tasks.abort_all();
    }
}
