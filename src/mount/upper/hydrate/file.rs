//! Makes one file, or one symbolic link, local as a whole.
//!
//! A file gets its place first, then its missing parts, several side by side. A part is asked for through
//! `ensure_range`, as a read would: what somebody else fetches is waited for, what somebody wrote is kept. When that
//! fails, the lower is asked once more for what is missing, because only its own words tell a store that is away from
//! damage. What is gone meanwhile is not brought back.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use nix::errno::Errno;

use crate::mount::caller::Caller;
use crate::mount::fs::{FileKind, LocalId};
use crate::mount::lower::{Piece, PieceSink};
use crate::mount::upper::Upper;
use crate::mount::upper::content::Content;
use crate::mount::upper::hydrate::plan::Wanted;
use crate::mount::upper::hydrate::survey::{Held, Trouble, is_gone};
use crate::mount::upper::hydrate::{Hydrator, LOST, NO_STORE};
use crate::mount::upper::namespace::of_io;
use crate::mount::upper::volume::UpperFile;
use crate::repo::Urgency;

/// Parts of one file that are on their way side by side; all files together have [`super::REQUESTS_AT_ONCE`].
const PARTS_AT_ONCE: usize = 6;
/// After a file of which this much was fetched its data is put on stable storage, so that the sync at the end, and the
/// server's checkpoints until then, do not find gigabytes to write.
const SYNC_BYTES: u64 = 64 << 20;

impl Hydrator {
    /// Tries to make a file whole; `left` is what of its missing bytes is not accounted for.
    pub(super) async fn try_make_whole(
        &self,
        wanted: &Wanted,
        is_charged: bool,
        left: &mut u64,
    ) -> Result<(), Trouble> {
        let upper = &self.uppers[wanted.upper];
        let mut held = Held::new(upper);
        let entry = match held.enter(wanted.directory, &wanted.name).await {
            Ok(Some(entry)) => entry,
            Ok(None) => return Ok(()),
            Err(errno) => return Err(upper.cause_of_lookup(wanted.directory, &wanted.name, errno).await),
        };
        match entry.attributes.kind {
            FileKind::File => self.make_file_whole(wanted, entry.id, is_charged, left).await,
            FileKind::Symlink => upper.make_link_local(entry.id, &wanted.name).await,
            // Something else has taken the name.
            FileKind::Directory | FileKind::Fifo | FileKind::Socket => Ok(()),
        }
    }

    async fn make_file_whole(
        &self,
        wanted: &Wanted,
        id: LocalId,
        is_charged: bool,
        left: &mut u64,
    ) -> Result<(), Trouble> {
        let upper = &self.uppers[wanted.upper];
        let file = match upper.open_placed(id) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(()),
            Err(errno) if is_gone(errno) => return Ok(()),
            Err(errno) => return Err(Trouble::of_errno(errno, &wanted.name)),
        };
        let Some(content) = &file.node.content else { return Ok(()) };
        let mut windows = windows_of(&content.missing(&(0..u64::MAX)), self.part_bytes).into_iter();
        let mut parts = FuturesUnordered::new();
        let mut fetched = 0;
        loop {
            while parts.len() < PARTS_AT_ONCE
                && let Some(window) = windows.next()
            {
                parts.push(self.fetch_part(wanted, &file, window, is_charged));
            }
            let Some(outcome) = parts.next().await else { break };
            let bytes = outcome?;
            fetched += bytes;
            *left = left.saturating_sub(bytes);
            self.watch.fetched(bytes, self.filled_bytes(), self.clock.monotonic());
        }
        if fetched >= SYNC_BYTES {
            upper.sync_content(id).await?;
        }
        Ok(())
    }

    /// Fetches what is missing of a part, and returns how much that was.
    async fn fetch_part(
        &self,
        wanted: &Wanted,
        file: &UpperFile,
        range: Range<u64>,
        is_charged: bool,
    ) -> Result<u64, Trouble> {
        let Some(content) = &file.node.content else { return Ok(0) };
        let _permit = self.requests.acquire().await;
        let bytes: u64 = content.missing(&range).iter().map(|gap| gap.end - gap.start).sum();
        if bytes == 0 {
            return Ok(0);
        }
        let _under_way = self.gate(wanted.upper, if is_charged { bytes } else { 0 }).await;
        if !file.has_name() {
            return Ok(0);
        }
        if file.shared.stable.is_in_doubt() {
            return Err(Trouble::Lasting(LOST.to_owned()));
        }
        let caller = Caller::background();
        let mut fetch = std::pin::pin!(file.ensure_range(&caller, range.clone()));
        let outcome = match tokio::time::timeout(self.pauses.slow, fetch.as_mut()).await {
            Ok(outcome) => outcome,
            Err(_) => {
                self.watch.waits(NO_STORE);
                fetch.await
            }
        };
        let outcome = match outcome {
            Ok(()) => Ok(bytes),
            // Nobody needs it any more.
            Err(_) if !file.has_name() => Ok(0),
            Err(Errno::ENOSPC | Errno::EDQUOT) => Err(Trouble::Room),
            Err(errno) => Err(cause_of_fetch(file, content, &range, errno, &wanted.name).await),
        };
        // Damage, and a full disk, come after an answer.
        if !matches!(outcome, Err(Trouble::Store(_))) {
            self.store_answers();
        }
        outcome
    }
}

impl Upper {
    /// Opens a file of the lower and gives it its place in the upper; nothing where the file is not the lower's any
    /// more, or has lost its name.
    fn open_placed(&self, id: LocalId) -> Result<Option<Arc<UpperFile>>, Errno> {
        let file = self.open_file(id)?;
        let is_of_lower = file.node.content.as_ref().is_some_and(|content| content.lower_node().is_some());
        if !is_of_lower || !file.has_name() {
            return Ok(None);
        }
        // A name that goes between the two leaves a file without one, which goes when it is closed.
        self.shared.lock().materialize_file(id)?;
        Ok(Some(file))
    }

    async fn make_link_local(&self, id: LocalId, name: &[u8]) -> Result<(), Trouble> {
        let Ok(node) = self.node(id) else { return Ok(()) };
        let Some(lower) = &node.lower else { return Ok(()) };
        let target = self.shared.lower.read_link(lower.id).await.map_err(Trouble::of_lower)?;
        let made = self.shared.lock().materialize(id, Some(&target));
        match made {
            Err(errno) if !is_gone(errno) => Err(Trouble::of_errno(errno, name)),
            _ => Ok(()),
        }
    }

    /// Puts a file's data on stable storage by a descriptor of its own.
    ///
    /// The kernel tells of a failed write once for each descriptor: through the one that clients' calls go through, a
    /// sync of ours would take from PostgreSQL what its own fsync must be told. So would this one from a descriptor that
    /// is opened later; hence no sync succeeds once one has failed.
    async fn sync_content(&self, id: LocalId) -> Result<(), Trouble> {
        let file = {
            let namespace = self.shared.lock();
            let opened = namespace.place_of(id).and_then(|place| namespace.disk.open(&place).map_err(of_io));
            match opened {
                Err(errno) if is_gone(errno) => return Ok(()),
                opened => opened.map_err(|errno| Trouble::of_errno(errno, b"a file to be synced"))?,
            }
        };
        let stable = self.shared.stable.clone();
        let sync = move || stable.sync(|| file.sync(true));
        let synced = tokio::task::spawn_blocking(sync).await.unwrap_or_else(|error| Err(error.into()));
        synced.map_err(|error| Trouble::Lasting(format!("could not sync a file: {error}")))
    }
}

impl UpperFile {
    /// Tells whether a name leads to the file.
    fn has_name(&self) -> bool {
        self.shared.lock().table.get(self.node.id).is_ok_and(|record| !record.names.is_empty())
    }
}

/// Cuts what is missing into parts that begin and end on multiples of `part_bytes`.
fn windows_of(missing: &[Range<u64>], part_bytes: u64) -> Vec<Range<u64>> {
    let mut windows: Vec<Range<u64>> = Vec::new();
    for gap in missing {
        let mut at = gap.start;
        while at < gap.end {
            let end = gap.end.min((at / part_bytes + 1).saturating_mul(part_bytes));
            match windows.last_mut() {
                // One request fetches all that is missing within a part.
                Some(last) if last.start / part_bytes == at / part_bytes => last.end = end,
                _ => windows.push(at..end),
            }
            at = end;
        }
    }
    windows
}

/// Finds out why a part did not come.
async fn cause_of_fetch(
    file: &UpperFile,
    content: &Content,
    range: &Range<u64>,
    errno: Errno,
    name: &[u8],
) -> Trouble {
    let (Some(node), Some(gap)) = (content.lower_node(), content.first_missing(range)) else {
        return Trouble::of_errno(errno, name);
    };
    // Not as somebody who waits: that would be asked again for as long as a server's patience lasts.
    match file.shared.lower.fetch_each(node, &[gap], Urgency::Background, &Unwanted).await {
        Err(error) => Trouble::of_lower(error),
        Ok(()) => Trouble::of_errno(errno, name),
    }
}

/// Keeps nothing of what comes: only the error counts, and that of the last chunk as well.
struct Unwanted;

impl PieceSink for Unwanted {
    fn take(&self, _: Vec<Piece>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_keep_to_their_multiples_and_join_what_lies_in_one() {
        assert_eq!(windows_of(&[0..250], 100), [0..100, 100..200, 200..250]);
        assert_eq!(windows_of(&[10..20, 40..50, 90..120, 150..160], 100), [10..100, 100..160]);
        assert!(windows_of(&[], 100).is_empty());
        assert_eq!(windows_of(&[u64::MAX - 5..u64::MAX], 100).last().unwrap().end, u64::MAX);
    }
}
