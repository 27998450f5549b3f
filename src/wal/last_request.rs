//! What a server asks for when it ends its recovery: the history of the timeline that it leaves.
//!
//! It has removed its signal file by then, and has yet to write the history of its new timeline. A restore_command that
//! stops it there leaves a data directory which starts on the old timeline, beside whoever is on that still. So nothing
//! stops it: the first timeline has no history, the server's own copy is as good where the store cannot tell, and else
//! the store is waited for, however long. Segments are asked for before that.

use crate::pg::{
    ArchiveFileName, ClusterState, ControlFile, RECOVERY_SIGNAL, STANDBY_SIGNAL, TimelineHistory, TimelineId,
};
use crate::wal::data_directory::{read_at_most, read_control_file};
use crate::wal::fetch::FetchOptions;

/// What there is to go by when the store cannot tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LastRequest {
    /// Nothing is asked: there is no such history.
    First,
    /// The server has the history itself.
    OwnCopy,
    /// Nothing.
    Nothing,
}

/// As much as PostgreSQL's own are ever long, many times over.
const HISTORY_BYTES_MAX: u64 = 16 << 20;

/// Tells whether a server asks for this while it ends its recovery.
pub fn is_last_request(options: &FetchOptions) -> bool {
    read_control_file(&options.data_directory)
        .is_ok_and(|control| LastRequest::of(options, &control).is_some())
}

impl LastRequest {
    /// Tells the same; nothing for any other request.
    pub(super) fn of(options: &FetchOptions, control: &ControlFile) -> Option<Self> {
        let ArchiveFileName::History(timeline) = options.name else { return None };
        let is_there = |signal: &&str| options.data_directory.join(signal).exists();
        if control.state != ClusterState::InArchiveRecovery
            || [STANDBY_SIGNAL, RECOVERY_SIGNAL].iter().any(is_there)
        {
            return None;
        }
        Some(match timeline {
            TimelineId::FIRST => Self::First,
            _ if has_history(options, timeline) => Self::OwnCopy,
            _ => Self::Nothing,
        })
    }
}

fn has_history(options: &FetchOptions, timeline: TimelineId) -> bool {
    let path = options.data_directory.join("pg_wal").join(options.name.to_string());
    read_at_most(&path, HISTORY_BYTES_MAX)
        .is_ok_and(|bytes| TimelineHistory::parse(timeline, &String::from_utf8_lossy(&bytes)).is_ok())
}
