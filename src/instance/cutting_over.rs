//! The cut-over of a clone while its server runs: tried when everything is local, and again while somebody is in the way.
//!
//! The work is `cut_over`'s. It has a session of its own, so that nobody who asks the supervisor waits for it, and ends
//! before the server is stopped. A clone that was whole when its server started has no files open that are not local;
//! there only what killed attempts have left is dropped.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;

use crate::codec::RandomExt;
use crate::instance::cut_over::{CutOver, cut_over, drop_leftovers};
use crate::instance::server::Endpoint;
use crate::replication::{self, ErrorKind};
use crate::repo::Repository;

/// The cut-over of a server that runs.
#[derive(Debug)]
pub(super) struct CuttingOver {
    task: JoinSet<()>,
    has_begun: bool,
    is_needed: bool,
    waits_for: Arc<Mutex<Option<String>>>,
}

/// Between two attempts: who is in template0, for a minute or for an hour, is in nobody's way but this one's.
const AGAIN: Duration = Duration::from_secs(15);

impl CuttingOver {
    /// Begins nothing yet; `is_needed` where not everything is local when the server starts.
    pub(super) fn new(is_needed: bool) -> Self {
        Self { task: JoinSet::new(), has_begun: false, is_needed, waits_for: Arc::default() }
    }

    /// Lets it begin, once: everything is local, and the server takes writes.
    pub(super) fn begin(&mut self, repository: &Repository, endpoint: &Endpoint) {
        if !self.has_begun {
            let (repository, endpoint) = (repository.clone(), endpoint.clone());
            self.task.spawn(work(repository, endpoint, self.is_needed, self.waits_for.clone()));
            self.has_begun = true;
        }
    }

    /// Tells whether it has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Tells whether an attempt is under way that nothing is known to be in the way of.
    pub(super) fn is_busy(&mut self) -> bool {
        while self.task.try_join_next().is_some() {}
        !self.task.is_empty() && self.waits_for().is_none()
    }

    /// Returns what is in its way.
    pub(super) fn waits_for(&self) -> Option<String> {
        self.waits_for.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it, wherever it is.
    pub(super) async fn stop(&mut self) {
        self.task.shutdown().await;
    }
}

async fn work(
    repository: Repository,
    endpoint: Endpoint,
    is_needed: bool,
    waits_for: Arc<Mutex<Option<String>>>,
) {
    let tell = |reason: Option<String>| {
        *waits_for.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    };
    loop {
        let reason = match attempt(&repository, &endpoint, is_needed).await {
            Ok(CutOver::Done | CutOver::Unsupported) => return tell(None),
            Ok(CutOver::Waits { because }) => because,
            Err(error) if error.kind() == ErrorKind::Retry => error.to_string(),
            Err(error) => {
                tracing::warn!("sessions keep the files that they have open: {error}");
                return tell(None);
            }
        };
        tracing::info!("the cut-over waits: {reason}");
        tell(Some(reason));
        tokio::time::sleep(AGAIN).await;
    }
}

async fn attempt(
    repository: &Repository,
    endpoint: &Endpoint,
    is_needed: bool,
) -> Result<CutOver, replication::Error> {
    let session = endpoint.connect().await?;
    if is_needed {
        let random = repository.keyring().random().array();
        return cut_over(&session, random).await;
    }
    drop_leftovers(&session).await.map(|()| CutOver::Done)
}
