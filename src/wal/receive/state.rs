//! What the two halves of receive know of each other, and what is written down of both for those who look.
//!
//! The receiving half fills the spool and wakes the storing half; that one says how far the store has everything. Both
//! leave their troubles here, which `receive.json` in the site's spool folder tells until they are over. It also tells
//! when it was written, because a receiver that is killed leaves it as it was.

use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use crate::clock::Clock;
use crate::disk::durable::{Create, write_file};
use crate::disk::{self, Owner, state_file};
use crate::pg::{Lsn, TimelineId};
use crate::repo::{self, Repository};
use crate::wal::Error;
use crate::wal::receive::disk_work::on_disk;
use crate::wal::receive::gap::{Gap, keep_newest};
use crate::wal::receive::holes::SpoolHoles;
use crate::wal::spool::{Position, Spool};

/// Where the state is written, in the site's spool folder.
pub const STATE_FILE: &str = "receive.json";

/// How often the state is written down where it changes.
const STATE_INTERVAL: Duration = Duration::from_secs(1);
/// And where it does not, so that one sees that somebody is there.
const ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A receiver that has written nothing for so long has ended, or hangs with its disk. Some times the interval, for a
/// machine that is loaded.
const SILENCE_MAX: SignedDuration = SignedDuration::from_secs(60);

/// What receiving does at the moment, as `receive.json` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReceiveState {
    /// When this was written.
    #[serde(default)]
    pub written_at: Timestamp,
    /// Whether WAL is coming in.
    pub streaming: bool,
    /// The server, where there is one.
    pub server: Option<String>,
    /// The timeline that is received.
    pub timeline: Option<TimelineId>,
    /// Where the spool's WAL ends.
    pub received: Option<Lsn>,
    /// Where the store's WAL ends, without a gap before it.
    pub stored: Option<Lsn>,
    /// Bytes that wait in the spool.
    pub spooled_bytes: u64,
    /// Whether the spool's volume is too full to receive more.
    pub paused: bool,
    /// Why nothing is received, if so.
    pub receive_problem: Option<Problem>,
    /// Why something is not stored, or what is wrong in the store, if so.
    pub store_problem: Option<Problem>,
    /// WAL that no server has any more and that was never received, the oldest first: only a basebackup after it can be
    /// recovered beyond it.
    #[serde(default)]
    pub gaps: Vec<Gap>,
}

/// Something that is wrong until it is mended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    pub message: String,
    pub since: Timestamp,
}

impl ReceiveState {
    /// Tells whether no receiver has run for a while: none that runs leaves it as it is for so long.
    pub fn is_abandoned(&self, now: Timestamp) -> bool {
        now.duration_since(self.written_at) > SILENCE_MAX
    }
}

impl Problem {
    /// Describes what has ended receiving; who is told of the error logs it.
    pub(super) fn of_end(error: &Error, since: Timestamp) -> Self {
        Self { message: format!("receiving has ended: {error}"), since }
    }
}

/// What both halves share.
pub(super) struct Shared {
    pub spool: Spool,
    /// What is missing within it.
    pub holes: SpoolHoles,
    /// Something was spooled, or the server's timeline ended.
    pub spooled: Notify,
    /// How far the store has everything.
    pub durable: watch::Sender<Option<Position>>,
    /// The repository, once it could be opened.
    pub repository: watch::Sender<Option<Repository>>,
    state: Mutex<ReceiveState>,
    /// Held by whoever writes the state down, from looking at it on.
    writing: Mutex<()>,
}

impl Shared {
    /// Nothing is known but what was found: the spool, and gaps noted earlier.
    pub fn new(spool: Spool, gaps: Vec<Gap>) -> Self {
        Self {
            holes: SpoolHoles::of(&spool),
            spool,
            spooled: Notify::new(),
            durable: watch::Sender::new(None),
            repository: watch::Sender::new(None),
            state: Mutex::new(ReceiveState { gaps, ..ReceiveState::default() }),
            writing: Mutex::default(),
        }
    }

    /// Locks what is told of both, for a moment.
    pub fn state(&self) -> MutexGuard<'_, ReceiveState> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// Returns the state with what the spool and the store say.
    pub fn snapshot(&self) -> ReceiveState {
        let mut state = self.state().clone();
        let end = self.spool.end().or(*self.durable.borrow());
        state.received = end.map(|end| end.lsn);
        state.stored = self.durable.borrow().map(|durable| durable.lsn);
        state.spooled_bytes = self.spool.bytes();
        state
    }

    /// Writes down what there is to tell now, and returns it. What is written last was looked at last: a gap that was told
    /// is not written over by what had been seen before.
    pub fn write_down(
        &self,
        site_folder: &Path,
        owner: Option<Owner>,
        now: Timestamp,
    ) -> Result<ReceiveState, Error> {
        let _turn = self.writing.lock().expect("no holder of this lock panics");
        let state = self.snapshot();
        write_state(site_folder, &state, owner, now)?;
        Ok(state)
    }
}

/// Notes a trouble, and logs it where it is not the one that is known.
pub(super) fn note(known: &mut Option<Problem>, message: String, now: Timestamp) {
    if known.as_ref().is_none_or(|problem| problem.message != message) {
        tracing::error!("{message}");
        let since = known.as_ref().map_or(now, |problem| problem.since);
        *known = Some(Problem { message, since });
    }
}

/// Describes an error for those who read a state or a log, with what can be done.
pub(super) fn with_hint(error: &Error) -> String {
    match error.hint() {
        Some(hint) => format!("{error}. {hint}"),
        None => error.to_string(),
    }
}

/// Ends a trouble, which is said.
pub(super) fn clear(known: &mut Option<Problem>, what: &str) {
    if known.take().is_some() {
        tracing::warn!("{what}");
    }
}

/// Reads the state that a receiver wrote, nothing where none ever ran.
///
/// # Errors
/// Where the file is none that a receiver wrote, or cannot be read.
pub fn read_state(site_folder: &Path) -> Result<Option<ReceiveState>, Error> {
    match state_file::read_document(&site_folder.join(STATE_FILE), "the state of a receiver") {
        Err(error) if error.is_not_found() => Ok(None),
        Err(disk::Error::Malformed { path, detail, .. }) => Err(Error::Malformed { path, detail }),
        read => Ok(Some(read?)),
    }
}

/// Reads the gaps that were noted earlier. Whatever has become of the file, receiving goes on.
pub(super) fn remembered_gaps(site_folder: &Path) -> Vec<Gap> {
    let mut gaps = match read_state(site_folder) {
        Ok(state) => state.unwrap_or_default().gaps,
        Err(error) => {
            tracing::error!("whether WAL was missing before is not known any more: {error}");
            Vec::new()
        }
    };
    keep_newest(&mut gaps);
    gaps
}

/// Writes the state down whenever it has changed, and now and then; never returns but for a bug.
///
/// A full volume, or what has been put in the file's place, must not end what empties the spool.
pub(super) async fn keep_written(
    site_folder: &Path,
    owner: Option<Owner>,
    shared: &Arc<Shared>,
    clock: &dyn Clock,
) -> Result<(), Error> {
    let (mut known, mut trouble) = (None, None);
    loop {
        let begun = clock.monotonic();
        if is_due(known.as_ref(), &shared.snapshot(), begun) {
            let (shared, folder, now) = (shared.clone(), site_folder.to_owned(), clock.now());
            let writing = tokio::task::spawn_blocking(move || shared.write_down(&folder, owner, now));
            match writing.await.map_err(|error| repo::Error::Internal(error.to_string()))? {
                Ok(state) => (known, trouble) = (Some((state, begun)), None),
                Err(error) => {
                    let message = Some(error.to_string());
                    if trouble != message {
                        tracing::warn!("{error}");
                    }
                    trouble = message;
                }
            }
        }
        tokio::time::sleep(STATE_INTERVAL).await;
    }
}

/// Decides whether to write a state down; `known` is what was written, and when.
fn is_due(known: Option<&(ReceiveState, Instant)>, state: &ReceiveState, now: Instant) -> bool {
    known.is_none_or(|(known, written)| {
        known != state || now.saturating_duration_since(*written) >= ALIVE_INTERVAL
    })
}

/// Writes a state down now and then that does not change; never returns.
pub(super) async fn keep_alive(
    site_folder: &Path,
    state: &ReceiveState,
    owner: Option<Owner>,
    clock: &dyn Clock,
) -> Infallible {
    loop {
        tokio::time::sleep(ALIVE_INTERVAL).await;
        warn_of(put_state(site_folder, state, owner, clock.now()).await);
    }
}

/// Says that the state could not be written down, which is no reason to do anything else than before.
pub(super) fn warn_of<T>(written: Result<T, Error>) {
    if let Err(error) = written {
        tracing::warn!("{error}");
    }
}

/// Writes down what there is to tell of both halves, while others go on.
pub(super) async fn put_all(
    shared: &Arc<Shared>,
    site_folder: &Path,
    owner: Option<Owner>,
    now: Timestamp,
) -> Result<ReceiveState, Error> {
    let (shared, folder) = (shared.clone(), site_folder.to_owned());
    on_disk(move || shared.write_down(&folder, owner, now)).await
}

/// Writes a state down, while others go on.
pub(super) async fn put_state(
    site_folder: &Path,
    state: &ReceiveState,
    owner: Option<Owner>,
    now: Timestamp,
) -> Result<(), Error> {
    let (folder, state) = (site_folder.to_owned(), state.clone());
    on_disk(move || write_state(&folder, &state, owner, now)).await
}

fn write_state(
    site_folder: &Path,
    state: &ReceiveState,
    owner: Option<Owner>,
    now: Timestamp,
) -> Result<(), Error> {
    let path = site_folder.join(STATE_FILE);
    let state = ReceiveState { written_at: now, ..state.clone() };
    let mut text = serde_json::to_vec_pretty(&state).expect("a struct of plain fields has a JSON form");
    text.push(b'\n');
    Ok(write_file(&path, &text, Create { owner, ..Create::PRIVATE_FILE })?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::clock::ManualClock;

    use super::*;

    #[test]
    fn a_state_that_does_not_change_is_written_often_enough_not_to_look_abandoned() {
        let clock = ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap());
        let state = ReceiveState::default();
        assert!(state.is_abandoned(clock.now()), "as an earlier release left it");
        assert!(is_due(None, &state, clock.monotonic()));
        let (written_at, known) = (clock.now(), (state.clone(), clock.monotonic()));
        let written = ReceiveState { written_at, ..state.clone() };
        while !is_due(Some(&known), &state, clock.monotonic()) {
            let other = ReceiveState { paused: true, ..state.clone() };
            assert!(is_due(Some(&known), &other, clock.monotonic()));
            clock.advance(STATE_INTERVAL);
        }
        // Even where the disk takes its time.
        clock.advance(ALIVE_INTERVAL);
        assert!(!written.is_abandoned(clock.now()));
        clock.advance(Duration::from_secs(60));
        assert!(written.is_abandoned(clock.now()));
        // The clock of the machine was set back.
        assert!(!written.is_abandoned(Timestamp::UNIX_EPOCH));
    }

    #[test]
    fn whatever_stands_in_the_place_of_the_state_nothing_is_remembered_and_nothing_fails() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join(STATE_FILE);
        assert_eq!(read_state(scratch.path()).unwrap(), None);
        let sparse = |file: &Path| fs::File::create(file).unwrap().set_len(1 << 40).unwrap();
        let pipe = |file: &Path| nix::unistd::mkfifo(file, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let put: [&dyn Fn(&Path); 6] = [
            &|file| fs::write(file, "").unwrap(),
            &|file| fs::write(file, "[".repeat(100_000)).unwrap(),
            &|file| fs::write(file, r#"{"gaps": [{"from": "0/0", "to": -1}]}"#).unwrap(),
            // Nobody ever writes into it: whoever opens it to read would wait.
            &pipe,
            &sparse,
            &|file| fs::create_dir(file).unwrap(),
        ];
        for put in put {
            put(&path);
            read_state(scratch.path()).unwrap_err();
            assert_eq!(remembered_gaps(scratch.path()), []);
            let now = Timestamp::from_second(1).unwrap();
            let written = write_state(scratch.path(), &ReceiveState::default(), None, now);
            assert_eq!(written.is_ok(), !path.is_dir());
            if !path.is_dir() {
                let written = ReceiveState { written_at: now, ..ReceiveState::default() };
                assert_eq!(read_state(scratch.path()).unwrap(), Some(written));
                fs::remove_file(&path).unwrap();
            }
        }
    }
}
