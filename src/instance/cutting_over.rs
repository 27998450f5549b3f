//! The cut-over of a clone while its server runs: tried when everything is local, and again while somebody is in the way.
//!
//! The work is `cut_over`'s. It has a session of its own, so that nobody who asks the supervisor waits for it, and ends
//! before the server is stopped. A clone that was whole when its server started has no files open that are not local;
//! there only what killed attempts have left is dropped. An attempt that costs the server something is made ever more
//! rarely. What cannot come about is told with its reason: whoever waits for the end of it has to hear that there is none.

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
    outcome: Option<Outcome>,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    /// Every process has let go of its files.
    Done,
    /// Those that are open stay open, for this reason.
    NotDone(String),
}

/// What follows from an attempt.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// It was the last one.
    Over(Outcome),
    /// There is another one.
    Again { because: String, is_costly: bool },
}

/// Between two attempts: who is in template0, for a minute or for an hour, is in nobody's way but this one's.
const AGAIN: Duration = Duration::from_secs(15);
/// The pause doubles up to this with each attempt that has cost something: WAL of a database, a checkpoint at once.
const AGAIN_MAX: Duration = Duration::from_secs(10 * 60);

impl CuttingOver {
    /// Begins nothing yet; `is_needed` where not everything is local when the server starts.
    pub(super) fn new(is_needed: bool) -> Self {
        Self { task: JoinSet::new(), has_begun: false, is_needed, state: Arc::default() }
    }

    /// Lets it begin, once: everything is local, and the server takes writes.
    pub(super) fn begin(&mut self, repository: &Repository, endpoint: &Endpoint) {
        if !self.has_begun {
            let (repository, endpoint) = (repository.clone(), endpoint.clone());
            let is_needed = self.is_needed;
            self.begin_with(move || {
                let (repository, endpoint) = (repository.clone(), endpoint.clone());
                async move { attempt(&repository, &endpoint, is_needed).await }
            });
        }
    }

    fn begin_with<F>(&mut self, attempt: impl Fn() -> F + Send + 'static)
    where
        F: Future<Output = Result<CutOver, replication::Error>> + Send + 'static,
    {
        self.state = Arc::new(Mutex::new(State { is_trying: true, ..State::default() }));
        self.task.spawn(work(attempt, self.state.clone()));
        self.has_begun = true;
    }

    /// Takes note that it cannot begin at all.
    pub(super) fn give_up(&mut self, reason: &str) {
        if !self.has_begun {
            tracing::warn!("sessions keep the files that they have open: {reason}");
            let outcome = Some(Outcome::NotDone(reason.to_owned()));
            self.state = Arc::new(Mutex::new(State { outcome, ..State::default() }));
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

    /// Returns what came of it, or what it waits for; nothing before it has been tried once.
    pub(super) fn told(&self) -> Option<String> {
        let state = lock(&self.state);
        match (&state.outcome, &state.waits_for) {
            (Some(Outcome::Done), _) => Some("done".to_owned()),
            (Some(Outcome::NotDone(reason)), _) => Some(format!("not done: {reason}")),
            (None, Some(waits_for)) => Some(format!("waits: {waits_for}")),
            (None, None) => None,
        }
    }

    /// Ends it, wherever it is.
    pub(super) async fn stop(&mut self) {
        self.task.shutdown().await;
    }
}

async fn work<F>(attempt: impl Fn() -> F, state: Arc<Mutex<State>>)
where
    F: Future<Output = Result<CutOver, replication::Error>>,
{
    let mut pause = AGAIN;
    loop {
        let next = plan_next(attempt().await);
        {
            let mut state = lock(&state);
            state.is_trying = false;
            match next {
                Next::Over(outcome) => {
                    if let Outcome::NotDone(reason) = &outcome {
                        tracing::warn!("sessions keep the files that they have open: {reason}");
                    }
                    state.waits_for = None;
                    state.outcome = Some(outcome);
                    return;
                }
                Next::Again { because, is_costly } => {
                    tracing::info!("the cut-over waits: {because}");
                    state.waits_for = Some(because);
                    pause = pause_after(pause, is_costly);
                }
            }
        }
        tokio::time::sleep(pause).await;
        let mut state = lock(&state);
        if state.is_paused {
            return;
        }
        state.is_trying = true;
    }
}

/// Decides what follows from an attempt.
fn plan_next(attempted: Result<CutOver, replication::Error>) -> Next {
    match attempted {
        Ok(CutOver::Done) => Next::Over(Outcome::Done),
        Ok(CutOver::Unsupported) => {
            Next::Over(Outcome::NotDone("PostgreSQL before 15 has no means".to_owned()))
        }
        Ok(CutOver::Waits { because, is_costly }) => Next::Again { because, is_costly },
        Err(error) if error.kind() == ErrorKind::Retry => {
            Next::Again { because: error.to_string(), is_costly: false }
        }
        Err(error) => Next::Over(Outcome::NotDone(error.to_string())),
    }
}

/// Returns how long the next attempt waits, by how long the last one did.
fn pause_after(pause: Duration, is_costly: bool) -> Duration {
    if is_costly { (pause * 2).min(AGAIN_MAX) } else { pause }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(sqlstate: &str) -> replication::Error {
        let message = "permission denied to create database".to_owned();
        replication::Error::Sql { sqlstate: sqlstate.to_owned(), message, detail: None, hint: None }
    }

    fn kept_out() -> replication::Error {
        let (address, user) = ("/run/postgresql".to_owned(), "postgres".to_owned());
        replication::Error::AuthenticationFailed { address, user, message: "no pg_hba.conf entry".to_owned() }
    }

    /// Begins one whose attempts all come to the same, and returns it after the first.
    async fn tried(attempted: fn() -> Result<CutOver, replication::Error>) -> CuttingOver {
        let mut cutting = CuttingOver::new(true);
        assert_eq!(cutting.told(), None);
        cutting.begin_with(move || std::future::ready(attempted()));
        while cutting.told().is_none() {
            tokio::task::yield_now().await;
        }
        cutting
    }

    #[tokio::test]
    async fn only_what_was_done_is_told_as_done() {
        assert_eq!(tried(|| Ok(CutOver::Done)).await.told().unwrap(), "done");
        let old = tried(|| Ok(CutOver::Unsupported)).await.told().unwrap();
        assert!(old.starts_with("not done: ") && old.contains("15"), "{old}");
        let refused = tried(|| Err(refused("42501"))).await.told().unwrap();
        assert_eq!(refused, "not done: permission denied to create database");
        let kept_out = tried(|| Err(kept_out())).await.told().unwrap();
        assert!(
            kept_out.starts_with("not done: ") && kept_out.contains("no pg_hba.conf entry"),
            "{kept_out}"
        );
    }

    #[tokio::test]
    async fn what_waits_is_told_and_can_be_paused() {
        let lost = || Err(replication::Error::Lost { detail: "it ended".to_owned() });
        let mut cutting = tried(lost).await;
        assert!(cutting.told().unwrap().starts_with("waits: "), "{:?}", cutting.told());
        assert!(cutting.pause(), "it only waits");
        assert!(!cutting.has_begun(), "it may begin again");
    }

    #[test]
    fn what_cannot_begin_is_told() {
        let mut cutting = CuttingOver::new(true);
        cutting.give_up("there is no socket");
        assert!(cutting.has_begun() && cutting.pause());
        assert_eq!(cutting.told().unwrap(), "not done: there is no socket");
    }

    #[test]
    fn an_attempt_that_costs_something_is_made_ever_more_rarely() {
        assert_eq!(pause_after(AGAIN, false), AGAIN);
        let mut pauses = vec![AGAIN];
        (0..8).for_each(|n| pauses.push(pause_after(pauses[n], true)));
        let seconds: Vec<u64> = pauses.iter().map(Duration::as_secs).collect();
        assert_eq!(seconds, [15, 30, 60, 120, 240, 480, 600, 600, 600]);
        let because = || "it comes to no barrier".to_owned();
        let waits = CutOver::Waits { because: because(), is_costly: true };
        assert_eq!(plan_next(Ok(waits)), Next::Again { because: because(), is_costly: true });
        let disk_is_full = plan_next(Err(refused("53100")));
        assert!(matches!(disk_is_full, Next::Again { is_costly: false, .. }), "{disk_is_full:?}");
    }
}
