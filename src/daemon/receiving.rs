//! WAL by streaming as a job of the daemon: begun again after whatever ended it, and told of the daemon's end in time to
//! keep what has come.
//!
//! Unlike the other jobs it is not dropped where it waits: it is given its moments to store what is spooled. What it
//! could not begin with, such as a key that is not there yet, is tried again as well.

use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::pending;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::clock::Clock;
use crate::control::Failure;
use crate::wal;
use crate::wal::receive::{OpenRepository, ReceiveOptions, run};

use super::shutdown::Shutdown;

/// What a site receives with; asked for again at each attempt, as the configuration's files may change.
pub type PrepareReceiving = Box<dyn Fn() -> Result<(ReceiveOptions, OpenRepository), Failure> + Send + Sync>;

/// The sites' receivers.
pub(super) struct Receivers {
    tasks: JoinSet<()>,
    clock: Arc<dyn Clock>,
    failure_of: fn(wal::Error) -> Failure,
}

/// What ended it does not mend itself within seconds; each attempt is an error in the log.
const AGAIN_AFTER: Duration = Duration::from_secs(30);

impl Receivers {
    pub(super) fn new(clock: Arc<dyn Clock>, failure_of: fn(wal::Error) -> Failure) -> Self {
        Self { tasks: JoinSet::new(), clock, failure_of }
    }

    /// Receives for a site until the daemon's end is wanted.
    pub(super) fn start(&mut self, site: String, prepare: PrepareReceiving, shutdown: Shutdown) {
        let (clock, failure_of, prepare) = (self.clock.clone(), self.failure_of, Arc::new(prepare));
        self.tasks.spawn(async move {
            let (stop, stopped) = watch::channel(false);
            let receiving = async {
                while !*stopped.borrow() {
                    let attempt = attempt(&prepare, clock.clone(), stopped.clone(), failure_of);
                    let failure = match AssertUnwindSafe(attempt).catch_unwind().await {
                        Ok(Ok(())) => return,
                        Ok(Err(failure)) => failure.message,
                        Err(_) => "it panicked".to_owned(),
                    };
                    tracing::error!(site, "receiving has ended and begins again: {failure}");
                    let mut stopped = stopped.clone();
                    let _ = tokio::time::timeout(AGAIN_AFTER, stopped.wait_for(|stopped| *stopped)).await;
                }
            };
            tokio::select! {
                () = receiving => {}
                () = async { shutdown.requested().await; stop.send_replace(true); pending().await } => {}
            }
        });
    }

    /// Resolves once all have ended, which they do after the daemon's end was wanted.
    pub(super) async fn all_ended(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

async fn attempt(
    prepare: &Arc<PrepareReceiving>,
    clock: Arc<dyn Clock>,
    stopped: watch::Receiver<bool>,
    failure_of: fn(wal::Error) -> Failure,
) -> Result<(), Failure> {
    let prepare = prepare.clone();
    // It looks at the state folder, whose volume may hang: the other sites need this thread.
    let (options, open) = match tokio::task::spawn_blocking(move || prepare()).await {
        Ok(prepared) => prepared?,
        Err(error) => resume_unwind(error.into_panic()),
    };
    run(options, open, clock, stopped).await.map_err(failure_of)
}
