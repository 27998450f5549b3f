//! The cut-over of a clone while its server runs: tried when everything is local, and again while somebody is in the way.
//!
//! The work is `cut_over`'s. It has a session of its own, so that nobody who asks the supervisor waits for it, and ends
//! before the server is stopped. A clone that was whole when its server started has no files open that are not local;
//! there only what killed attempts have left is dropped.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
    state: Arc<Mutex<State>>,
}

/// What its task and those who ask know of each other.
#[derive(Debug, Default)]
struct State {
    is_trying: bool,
    is_paused: bool,
    waits_for: Option<String>,
}

/// Between two attempts: who is in template0, for a minute or for an hour, is in nobody's way but this one's.
const AGAIN: Duration = Duration::from_secs(15);

impl CuttingOver {
    /// Begins nothing yet; `is_needed` where not everything is local when the server starts.
    pub(super) fn new(is_needed: bool) -> Self {
        Self { task: JoinSet::new(), has_begun: false, is_needed, state: Arc::default() }
    }

    /// Lets it begin, once: everything is local, and the server takes writes.
    pub(super) fn begin(&mut self, repository: &Repository, endpoint: &Endpoint) {
        if !self.has_begun {
            let (repository, endpoint) = (repository.clone(), endpoint.clone());
            self.state = Arc::new(Mutex::new(State { is_trying: true, ..State::default() }));
            self.task.spawn(work(repository, endpoint, self.is_needed, self.state.clone()));
            self.has_begun = true;
        }
    }

    /// Tells whether it has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Has it try no more until it begins again; false while it is trying, for what is cut off then may leave a database.
    pub(super) fn pause(&mut self) -> bool {
        while self.task.try_join_next().is_some() {}
        let mut state = lock(&self.state);
        if self.task.is_empty() || state.is_paused {
            return true;
        }
        if state.is_trying {
            return false;
        }
        // Whoever wakes up now sees it.
        state.is_paused = true;
        state.waits_for = None;
        self.task.abort_all();
        self.has_begun = false;
        true
    }

    /// Returns what is in its way.
    pub(super) fn waits_for(&self) -> Option<String> {
        lock(&self.state).waits_for.clone()
    }

    /// Tells whether it has come to its end.
    pub(super) fn is_over(&mut self) -> bool {
        while self.task.try_join_next().is_some() {}
        self.has_begun && self.task.is_empty()
    }

    /// Ends it, wherever it is.
    pub(super) async fn stop(&mut self) {
        self.task.shutdown().await;
    }
}

async fn work(repository: Repository, endpoint: Endpoint, is_needed: bool, state: Arc<Mutex<State>>) {
    loop {
        let reason = match attempt(&repository, &endpoint, is_needed).await {
            Ok(CutOver::Done | CutOver::Unsupported) => None,
            Ok(CutOver::Waits { because }) => Some(because),
            Err(error) if error.kind() == ErrorKind::Retry => Some(error.to_string()),
            Err(error) => {
                tracing::warn!("sessions keep the files that they have open: {error}");
                None
            }
        };
        let is_over = reason.is_none();
        reason.iter().for_each(|reason| tracing::info!("the cut-over waits: {reason}"));
        {
            let mut state = lock(&state);
            state.is_trying = false;
            state.waits_for = reason;
        }
        if is_over {
            return;
        }
        tokio::time::sleep(AGAIN).await;
        let mut state = lock(&state);
        if state.is_paused {
            return;
        }
        state.is_trying = true;
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
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
