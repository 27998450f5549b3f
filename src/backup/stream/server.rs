//! The server that sends a basebackup: the session by which it is asked and watched, and a replication connection.
//!
//! One at a time: a walsender takes a place of `max_wal_senders`, and keeps it until it has gone, which may be long after
//! its client has. So a connection that is not wanted any more is ended, and the next one waits for its place. A server
//! that says nothing for long is asked by the session whether it is there at all.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;

use crate::backup::changed_blocks::ChangedBlocks;
use crate::backup::error::Error;
use crate::backup::known_parent::KnownParent;
use crate::backup::source::SourceError;
use crate::backup::stream::histories::history_of;
use crate::backup::stream::origin::{RemoteOrigin, connect};
use crate::backup::stream::parent_manifest::upload;
use crate::backup::wal_summaries::{Summaries, WalSpan, read_summaries};
use crate::replication::{
    BaseBackup, BaseBackupOptions, ConnectOptions, Error as SessionError, Param, ReplicationConnection,
    Session,
};
use crate::repo::Repository;

/// The server, by SQL.
#[derive(Debug)]
pub struct Server {
    /// Asks, and is watched.
    pub session: Session,
    /// What it said before anything was begun.
    pub origin: RemoteOrigin,
    connection: ConnectOptions,
    /// The name of the replication connection that was made last.
    last: Mutex<Option<String>>,
    /// Told of everything that comes.
    heard: Arc<Notify>,
}

/// How long summaries may take that the server has just read itself.
const SUMMARIES_PATIENCE: Duration = Duration::from_secs(10);
/// How long a walsender of ours may take to go; then the server says itself that there is no place.
const GOING_MAX: Duration = Duration::from_secs(10);
/// From the process list one has gone a moment before its place is free.
const FULL_MAX: u32 = 20;
/// Between two looks.
const POLL: Duration = Duration::from_millis(50);
/// SQLSTATE `too_many_connections`.
const FULL: &str = "53300";
/// A server from which nothing has come for so long is asked, and given up after twice as long (failure 39): one that is
/// frozen keeps its connections, and its kernel answers keepalive packets. A checkpoint or a disk may take longer, and
/// the server answers meanwhile.
const SILENCE_ASKED: Duration = Duration::from_secs(30);
const UNPOISONED: &str = "no holder of this lock panics";
const OURS: &str = "FROM pg_stat_activity WHERE application_name = $1 AND backend_type = 'walsender'";

impl Server {
    /// Prepares for connections to the server that a session has reached.
    pub fn new(connection: ConnectOptions, session: Session, origin: RemoteOrigin) -> Self {
        Self { session, origin, connection, last: Mutex::default(), heard: Arc::default() }
    }

    /// Returns whom to tell of everything that comes.
    pub fn heard(&self) -> Arc<Notify> {
        self.heard.clone()
    }

    /// Waits until the server says nothing any more, neither by itself nor when it is asked.
    pub async fn falls_silent(&self) -> SessionError {
        let ask = async || self.session.query_one("SELECT 1 AS here", &[]).await.map(drop);
        silence(&self.heard, SILENCE_ASKED, ask).await
    }

    /// Makes a replication connection to it, when the one before has gone.
    pub async fn connect(&self, repository: &Repository) -> Result<ReplicationConnection, Error> {
        let mut once = [0; 8];
        repository.keyring().random().fill(&mut once);
        let name = format!("walden {}", hex::encode(once));
        let connecting = || connect(&self.connection, &self.session, &self.origin.facts, &name);
        let before = self.last.lock().expect(UNPOISONED).replace(name.clone());
        let Some(before) = before else {
            return connecting().await;
        };
        self.until_gone(&before).await.map_err(SourceError::from)?;
        for _ in 0..FULL_MAX {
            match connecting().await {
                Err(error) if is_full(&error) => tokio::time::sleep(POLL).await,
                connected => return connected,
            }
        }
        connecting().await
    }

    /// Ends the walsender of the replication connection that was made last, which `connection` holds.
    ///
    /// It is terminated while it still has a client, who takes nothing: so it is found waiting, and ends at once. Without
    /// one it would look around between two files only, of which a relation's have 1 GiB.
    pub async fn end<C>(&self, connection: C) {
        let name = self.last.lock().expect(UNPOISONED).clone();
        let ending = async {
            let Some(name) = name else { return Ok(()) };
            let terminate = format!("SELECT pg_terminate_backend(pid) AS told {OURS}");
            self.session.query(&terminate, &[Param::Text(&name)]).await?;
            self.until_gone(&name).await
        };
        match tokio::time::timeout(GOING_MAX, ending).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("the server goes on sending for a while: {error}"),
            Err(_) => tracing::debug!("the server goes on sending for a while"),
        }
        drop(connection);
    }

    /// Waits until the server has no walsender of that name any more, but not for ever.
    async fn until_gone(&self, name: &str) -> Result<(), SessionError> {
        let count = format!("SELECT count(*) AS found {OURS}");
        let going = async {
            while self.session.query_one(&count, &[Param::Text(name)]).await?.int("found")? > 0 {
                tokio::time::sleep(POLL).await;
            }
            Ok(())
        };
        tokio::time::timeout(GOING_MAX, going).await.unwrap_or(Ok(()))
    }

    /// Has it begin, with changes alone if that `parent` is given; where that does not do, with everything.
    pub async fn begin(
        &self,
        repository: &Repository,
        asked: &BaseBackupOptions,
        parent: Option<Arc<KnownParent>>,
    ) -> Result<(BaseBackup, Option<ChangedBlocks>), Error> {
        if let Some(parent) = parent {
            match self.begin_with_changes(repository, asked, parent).await? {
                Ok((base, summaries)) => return Ok((base, Some(summaries))),
                Err(why) => tracing::warn!("the server sends everything: {why}"),
            }
        }
        let replication = self.connect(repository).await?;
        let base = BaseBackup::start(replication, self.origin.facts.version, asked).await;
        Ok((base.map_err(SourceError::from)?, None))
    }

    /// Has it begin with what has changed since `parent`; returns the summaries it takes that from, or why everything has
    /// to come.
    async fn begin_with_changes(
        &self,
        repository: &Repository,
        asked: &BaseBackupOptions,
        parent: Arc<KnownParent>,
    ) -> Result<Result<(BaseBackup, ChangedBlocks), String>, Error> {
        let facts = &self.origin.facts;
        let from = (parent.facts().timeline, parent.facts().start_lsn);
        let mut replication = self.connect(repository).await?;
        let history = match facts.identity.timeline {
            timeline if timeline == from.0 => None,
            timeline => history_of(&mut replication, timeline).await?.map(|(history, _)| history),
        };
        let asked = BaseBackupOptions { incremental: true, ..asked.clone() };
        let beginning = async {
            let replication = upload(replication, parent, facts).await?;
            let base = BaseBackup::start(replication, facts.version, &asked).await;
            Ok::<_, Error>(base.map_err(SourceError::from)?)
        };
        let base = match beginning.await {
            Ok(base) => base,
            Err(error) => return why_everything(error).map(Err),
        };
        let (start, timeline) = base.started();
        let why = match WalSpan::between(history.as_ref(), from, (timeline, start)) {
            None => format!("timeline {timeline} does not come from the last basebackup"),
            Some(spans) => {
                // It has them all by now. In its archives it does not say from where a relation was cut.
                let read = read_summaries(&self.session, &spans, repository.clock(), SUMMARIES_PATIENCE);
                match read.await.map_err(SourceError::from)? {
                    Summaries::Known(changed) => return Ok(Ok((base, changed))),
                    Summaries::None(why) => why.to_string(),
                }
            }
        };
        // It sends what nobody will take, in the place that is needed next.
        self.end(base).await;
        Ok(Err(format!("it cannot say what has changed: {why}")))
    }
}

/// Says why everything has to come, where that is what an error means: the server refuses what was asked, or what was to
/// be sent up cannot be read.
pub(super) fn why_everything(error: Error) -> Result<String, Error> {
    match error {
        Error::Source(SourceError::Session(error @ SessionError::Sql { .. })) => {
            Ok(format!("it cannot say what has changed: {error}"))
        }
        Error::State(error) => Ok(format!("what this host remembers cannot be read: {error}")),
        error => Err(error),
    }
}

fn is_full(error: &Error) -> bool {
    matches!(error, Error::Source(SourceError::Session(error)) if error.sqlstate() == Some(FULL))
}

/// Waits until nothing was heard for `asked_after`, and the question then put was not answered for as long.
async fn silence(
    heard: &Notify,
    asked_after: Duration,
    ask: impl AsyncFn() -> Result<(), SessionError>,
) -> SessionError {
    loop {
        tokio::select! {
            () = heard.notified() => continue,
            () = tokio::time::sleep(asked_after) => {}
        }
        let answered = tokio::select! {
            () = heard.notified() => continue,
            answered = tokio::time::timeout(asked_after, ask()) => answered,
        };
        match answered {
            // A refusal is an answer as well.
            Ok(Ok(()) | Err(SessionError::Sql { .. })) => {}
            Ok(Err(error)) => return error,
            Err(_) => {
                let seconds = 2 * asked_after.as_secs();
                let detail = format!("the server has been silent for {seconds} s, and answers no question");
                return SessionError::Lost { detail };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future;
    use std::sync::atomic::{AtomicU32, Ordering};

    use crate::backup::state::StateError;

    use super::*;

    /// So short that a test is not long, and so long that a busy machine does not miss it.
    const ASKED: Duration = Duration::from_millis(200);

    fn lost() -> SessionError {
        SessionError::Lost { detail: "gone".to_owned() }
    }

    #[tokio::test]
    async fn failure_39_a_server_that_answers_no_question_is_given_up_and_one_that_does_is_not() {
        let heard = Notify::new();
        let never = async || future::pending::<Result<(), SessionError>>().await;
        let error = silence(&heard, ASKED, never).await;
        assert!(matches!(&error, SessionError::Lost { detail } if detail.contains("silent")), "{error}");

        // An answer, a refusal, an answer; then the session ends.
        let asked = AtomicU32::new(0);
        let answers = async || match asked.fetch_add(1, Ordering::Relaxed) {
            1 => Err(SessionError::Sql {
                sqlstate: "25P02".to_owned(),
                message: "current transaction is aborted".to_owned(),
                detail: None,
                hint: None,
            }),
            3 => Err(lost()),
            _ => Ok(()),
        };
        let error = silence(&heard, Duration::from_millis(5), answers).await;
        assert_eq!((asked.load(Ordering::Relaxed), error.to_string()), (4, lost().to_string()));
    }

    /// Whatever comes is as good as an answer, also to a question that waits for one.
    #[tokio::test]
    async fn a_server_that_sends_is_not_silent() {
        let heard = Notify::new();
        let asked = AtomicU32::new(0);
        let answers = async || {
            if asked.fetch_add(1, Ordering::Relaxed) == 0 {
                heard.notify_one();
                future::pending::<()>().await;
            }
            Err::<(), _>(lost())
        };
        let error = silence(&heard, Duration::from_millis(5), answers).await;
        assert_eq!((asked.load(Ordering::Relaxed), error.to_string()), (2, lost().to_string()));
    }

    #[test]
    fn what_the_server_refuses_and_what_cannot_be_read_is_why_everything_comes() {
        let refused = SessionError::Sql {
            sqlstate: "55000".to_owned(),
            message: "WAL summaries are required".to_owned(),
            detail: None,
            hint: None,
        };
        let why = why_everything(SourceError::from(refused).into()).unwrap();
        assert!(why.contains("cannot say what has changed: WAL summaries"), "{why}");
        let damaged = StateError::Damaged { path: "/state/x.pages".into(), detail: "at byte 7".to_owned() };
        let why = why_everything(damaged.into()).unwrap();
        assert!(why.contains("remembers cannot be read") && why.contains("at byte 7"), "{why}");
        let error = why_everything(SourceError::from(lost()).into()).unwrap_err();
        assert!(matches!(error, Error::Source(SourceError::Session(SessionError::Lost { .. }))), "{error}");
    }

    #[test]
    fn only_a_server_without_a_place_is_full() {
        let error = |sqlstate: &str| {
            let (sqlstate, message) = (sqlstate.to_owned(), "no".to_owned());
            Error::from(SourceError::from(SessionError::Sql { sqlstate, message, detail: None, hint: None }))
        };
        assert!(is_full(&error("53300")) && !is_full(&error("53400")) && !is_full(&error("42501")));
    }
}
