//! What a `wal push` without a daemon does for the proof against a tail that is cut off: once in a quarter of an hour it
//! notes in the store how far the archive reaches, after its file is there.
//!
//! Neither a store that is slow nor a state folder that is not to be had is a failure of the push.

use std::time::Duration;

use crate::config::SiteConfig;
use crate::pg::ArchiveFileName;
use crate::repo::Repository;
use crate::wal::head;
use crate::wal::head_notes::{HeadNotes, Turn};
use crate::wal::push::CheckedFile;

use super::context::Context;
use super::error::CommandError;

/// PostgreSQL waits with the next segment for so long at most.
const HEAD_WAIT_MAX: Duration = Duration::from_secs(5);

/// Writes a head of the timeline of a file that has just been archived, if one is due.
pub(super) async fn keep_head(
    context: &Context,
    site: &SiteConfig,
    repository: &Repository,
    file: &CheckedFile,
) {
    let ArchiveFileName::Segment(segment) = file.name else { return };
    let turn = || -> Result<Turn, CommandError> {
        let state = context.config()?.paths.open_state()?;
        let notes = HeadNotes::of(&state.path, state.owner, &site.name);
        Ok(notes.take_turn(file.cluster, segment.timeline(), context.clock().now())?)
    };
    match turn() {
        Ok(Turn::Now) => {
            let kept = head::keep(repository, file.cluster, segment.timeline());
            if tokio::time::timeout(HEAD_WAIT_MAX, kept).await.is_err() {
                tracing::warn!(
                    "how far the archive reaches could not be noted within {} s",
                    HEAD_WAIT_MAX.as_secs()
                );
            }
        }
        Ok(Turn::In(_)) => {}
        Err(error) => {
            tracing::debug!("it cannot be told whether a head of the archive is due: {}", error.message());
        }
    }
}
