//! Timeline history files of a server on another host: asked for by name, and archived where the archive lacks them.
//!
//! The server's own timeline must have one; those of its ancestors are archived where the server still has them. They
//! are asked for as soon as the server has sent the last file: what is still to be stored then may take its time, and
//! a connection that nobody needs any more may end.

use bytes::Bytes;

use crate::backup::error::Error;
use crate::backup::source::SourceError;
use crate::backup::wal_wait::check_history;
use crate::pg::{TimelineHistory, TimelineId};
use crate::replication::{Error as SessionError, ReplicationConnection};
use crate::repo::{
    ClusterId, Repository,
    wal_object::{HistoryBranch, WalKey, archive_history},
};

/// Asks for the history of `timeline`, and for those of its ancestors.
pub async fn ask_histories(
    connection: &mut ReplicationConnection,
    timeline: TimelineId,
) -> Result<Vec<(TimelineHistory, Bytes)>, Error> {
    let (mut histories, mut wanted) = (Vec::new(), vec![timeline]);
    wanted.retain(|asked| *asked != TimelineId::FIRST);
    while let Some(asked) = wanted.pop() {
        let Some((history, raw)) = history_of(connection, asked).await? else { continue };
        if asked == timeline {
            wanted = history.ancestors().filter(|ancestor| *ancestor != TimelineId::FIRST).collect();
        }
        histories.push((history, raw));
    }
    Ok(histories)
}

/// Puts what the server has of the history of `timeline` into the archive.
///
/// # Errors
/// `HistoryMissing` where neither the server nor the archive has it; `Different` where another server archived another.
pub async fn archive_histories(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
    histories: &[(TimelineHistory, Bytes)],
) -> Result<(), Error> {
    if timeline == TimelineId::FIRST {
        return Ok(());
    }
    let key = WalKey::create(repository.keyring())?;
    for (history, raw) in histories {
        let branch = HistoryBranch::of(history);
        archive_history(repository, cluster, history.timeline, branch, raw, &key).await?;
    }
    check_history(repository, cluster, timeline).await
}

/// Returns a history as the server has it; nothing where it has none, or one that nobody could follow.
pub async fn history_of(
    connection: &mut ReplicationConnection,
    timeline: TimelineId,
) -> Result<Option<(TimelineHistory, Bytes)>, Error> {
    let raw = match connection.history(timeline).await {
        Ok(raw) => raw,
        Err(SessionError::Sql { .. }) => return Ok(None),
        Err(error) => return Err(SourceError::from(error).into()),
    };
    match TimelineHistory::parse(timeline, &String::from_utf8_lossy(&raw)) {
        Ok(history) => Ok(Some((history, raw))),
        Err(error) => {
            tracing::warn!("the server's history of timeline {timeline} is left out: {error}");
            Ok(None)
        }
    }
}
