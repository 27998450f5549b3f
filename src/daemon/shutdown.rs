//! The end of a daemon, told to everything in it: first that it is wanted, then that its time is up.
//!
//! Between the two, callers still get the answer they wait for, and nothing new begins.

use tokio::sync::watch;

/// How far the end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Running,
    Requested,
    Expired,
}

/// Who tells.
#[derive(Debug)]
pub(super) struct ShutdownSource(watch::Sender<Stage>);

/// What everything in the daemon listens to.
#[derive(Debug, Clone)]
pub(super) struct Shutdown(watch::Receiver<Stage>);

impl Default for ShutdownSource {
    fn default() -> Self {
        Self(watch::Sender::new(Stage::Running))
    }
}

impl ShutdownSource {
    pub(super) fn shutdown(&self) -> Shutdown {
        Shutdown(self.0.subscribe())
    }

    /// Tells that nothing new is to begin.
    pub(super) fn request(&self) {
        self.0.send_replace(Stage::Requested);
    }

    /// Tells that nothing is waited for any more.
    pub(super) fn expire(&self) {
        self.0.send_replace(Stage::Expired);
    }
}

impl Shutdown {
    /// Resolves when the end is wanted.
    pub(super) async fn requested(&self) {
        self.reached(Stage::Requested).await;
    }

    /// Resolves when the time is up.
    pub(super) async fn expired(&self) {
        self.reached(Stage::Expired).await;
    }

    async fn reached(&self, stage: Stage) {
        // Without its source the daemon is gone, and that is an end as well.
        let _ = self.0.clone().wait_for(|now| *now >= stage).await;
    }
}
