//! What the two halves of receive know of each other, and what is written down of both for those who look.
//!
//! The receiving half fills the spool and wakes the storing half; that one says how far the store has everything. Both
//! leave their troubles here, which `receive.json` in the site's spool folder tells until they are over.

use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use crate::disk::Owner;
use crate::disk::durable::{Create, write_file};
use crate::pg::{Lsn, TimelineId};
use crate::repo::Repository;
use crate::wal::Error;
use crate::wal::spool::{Position, Spool};

/// Where the state is written, in the site's spool folder.
pub const STATE_FILE: &str = "receive.json";

/// What receiving does at the moment, as `receive.json` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReceiveState {
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
    /// Why nothing is stored, if so.
    pub store_problem: Option<Problem>,
    /// WAL that no server has any more and that was never received: only a basebackup after it can be recovered
    /// beyond it.
    pub gap: Option<Gap>,
}

/// Something that is wrong until it is mended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    pub message: String,
    pub since: Timestamp,
}

/// A hole in what was received.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    pub timeline: TimelineId,
    pub from: Lsn,
    pub to: Lsn,
    pub noticed_at: Timestamp,
}

/// What both halves share.
pub(super) struct Shared {
    pub spool: Spool,
    /// Something was spooled, or the server's timeline ended.
    pub spooled: Notify,
    /// How far the store has everything.
    pub durable: watch::Sender<Option<Position>>,
    /// The repository, once it could be opened.
    pub repository: watch::Sender<Option<Repository>>,
    state: Mutex<ReceiveState>,
}

impl Shared {
    /// Nothing is known but what was found: the spool, and a gap noted earlier.
    pub fn new(spool: Spool, gap: Option<Gap>) -> Self {
        Self {
            spool,
            spooled: Notify::new(),
            durable: watch::Sender::new(None),
            repository: watch::Sender::new(None),
            state: Mutex::new(ReceiveState { gap, ..ReceiveState::default() }),
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
}

/// Notes a trouble, and logs it where it is not the one that is known.
pub(super) fn note(known: &mut Option<Problem>, message: String, now: Timestamp) {
    if known.as_ref().is_none_or(|problem| problem.message != message) {
        tracing::error!("{message}");
        let since = known.as_ref().map_or(now, |problem| problem.since);
        *known = Some(Problem { message, since });
    }
}

/// Ends a trouble, which is said.
pub(super) fn clear(known: &mut Option<Problem>, what: &str) {
    if known.take().is_some() {
        tracing::warn!("{what}");
    }
}

/// Reads the state that a receiver wrote, nothing where none ever ran.
pub fn read_state(site_folder: &Path) -> Option<ReceiveState> {
    let bytes = std::fs::read(site_folder.join(STATE_FILE)).ok()?;
    serde_json::from_slice(&bytes).ok()
}

pub(super) fn write_state(
    site_folder: &Path,
    state: &ReceiveState,
    owner: Option<Owner>,
) -> Result<(), Error> {
    let path = site_folder.join(STATE_FILE);
    let mut text = serde_json::to_vec_pretty(state).expect("a struct of plain fields has a JSON form");
    text.push(b'\n');
    Ok(write_file(&path, &text, Create { owner, ..Create::PRIVATE_FILE })?)
}
