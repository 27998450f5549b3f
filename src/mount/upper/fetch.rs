//! Getting content from the lower: the core that FUSE, a hydrator and another adapter stand on.
//!
//! `ensure_range` makes a range local: claim its windows, so that nobody else fetches them; look again, because
//! somebody just may have; fetch what is missing; write each piece, as it comes, where it is still missing, and let go
//! of its window; and check that all of it now is local, because an answer that falls short must be an error and never
//! zeros (failure 36). When the disk is full, or what is left of it is the server's (`room`), a read is answered from what
//! was fetched without keeping it.

use std::ops::{ControlFlow, Range};
use std::sync::Mutex;

use bytes::Bytes;
use nix::errno::Errno;
use tokio::runtime::{Handle, RuntimeFlavor};

use crate::mount::caller::Caller;
use crate::mount::errno;
use crate::mount::lower::{LowerError, NodeId, Piece, PieceSink};
use crate::mount::single_flight::Claim;
use crate::mount::upper::Shared;
use crate::mount::upper::content::{Content, Written};
use crate::mount::upper::namespace::of_io;
use crate::mount::upper::node::Node;
use crate::mount::upper::room::Use;
use crate::mount::upper::stats::Counters;
use crate::mount::upper::volume::UpperFile;
use crate::repo::Urgency;

impl UpperFile {
    /// Fails where something that was fetched is lost, and any of this file's bytes may be.
    pub(super) fn check_not_lost(&self) -> Result<(), Errno> {
        let is_of_lower = self.node.content.as_ref().is_some_and(|content| content.lower_node().is_some());
        if is_of_lower && self.shared.stable.is_in_doubt() { Err(Errno::EIO) } else { Ok(()) }
    }

    /// Makes a range local for a read, or fails with `ENOSPC` where it is not to be kept: then it is read through.
    pub(super) async fn ensure_to_read(&self, caller: &Caller, range: Range<u64>) -> Result<(), Errno> {
        let content = content_of(&self.node)?;
        if !content.is_mapped() {
            // What an earlier process fetched is known only once the upper's file has been looked at.
            self.open_if_local()?;
        }
        if content.first_missing(&range).is_some() && !self.shared.room.is_for(Use::Reads) {
            return Err(Errno::ENOSPC);
        }
        self.ensure_range(caller, range).await
    }

    /// Makes a range of the file local; what lies beyond what the lower has is local already.
    pub async fn ensure_range(&self, caller: &Caller, range: Range<u64>) -> Result<(), Errno> {
        let urgency = if caller.is_background { Urgency::Background } else { Urgency::Foreground };
        self.ensure_range_as(urgency, caller, range).await
    }

    /// Makes a range local like [`ensure_range`](Self::ensure_range), behind what is waited for more.
    ///
    /// What nobody waits for fails at the first failure of the store, whatever the patience of the moment, and with
    /// `ENOENT` once the file has no name any more.
    pub async fn ensure_range_as(
        &self,
        urgency: Urgency,
        caller: &Caller,
        range: Range<u64>,
    ) -> Result<(), Errno> {
        let content = content_of(&self.node)?;
        if !content.is_mapped() {
            self.shared.lock().materialize_file(self.node.id)?;
        }
        let Some(node) = content.lower_node() else { return Ok(()) };
        // The common case: no wait, no allocation, one look at the map.
        if content.first_missing(&range).is_none() {
            return Ok(());
        }
        if urgency == Urgency::Foreground {
            Counters::add(&self.shared.counters.waits, 1);
        }
        let _waiting = self.shared.foreground.enter(caller, self.node.id);
        caller.killable(self.fetch_missing(urgency, node, content, range)).await
    }

    async fn fetch_missing(
        &self,
        urgency: Urgency,
        node: NodeId,
        content: &Content,
        range: Range<u64>,
    ) -> Result<(), Errno> {
        loop {
            let missing = content.missing(&range);
            let (Some(first), Some(last)) = (missing.first(), missing.last()) else { return Ok(()) };
            let hull = first.start..last.end;
            // Of the hull only what is missing: what is local would always be free, and nobody would ever wait.
            let claim = self.shared.flights.claim(node, &missing, urgency).await;
            let claimed = claim.runs_in(&hull);
            let runs: Vec<Range<u64>> = claimed.iter().flat_map(|part| content.missing(part)).collect();
            // The wait for the claim may have cured it.
            if !runs.is_empty() {
                let filling = Filling {
                    file: self,
                    content,
                    urgency,
                    claim: Mutex::new(claim),
                    failed: Mutex::default(),
                };
                self.fill(node, &runs, &filling).await?;
            }
        }
    }

    /// Fetches runs that are missing, and makes sure that they are not any more.
    async fn fill(&self, node: NodeId, runs: &[Range<u64>], filling: &Filling<'_>) -> Result<(), Errno> {
        Counters::add(&self.shared.counters.fetches, 1);
        let outcome = self.shared.lower.fetch_each(node, runs, filling.urgency, filling).await;
        // Why no more was wanted comes before whatever the lower makes of that.
        filling.outcome()?;
        outcome.map_err(|error| errno::of_lower(&error))?;
        match runs.iter().find_map(|run| filling.content.first_missing(run)) {
            None => Ok(()),
            Some(gap) => {
                let detail = format!("a fetch of bytes {runs:?} of {node:?} left {gap:?} uncovered");
                Err(errno::of_lower(&LowerError::Contract { detail }))
            }
        }
    }

    /// Reads without keeping what has to be fetched for it.
    pub(super) async fn read_through(
        &self,
        caller: &Caller,
        offset: u64,
        length: u32,
    ) -> Result<Bytes, Errno> {
        let content = content_of(&self.node)?;
        let range = offset..offset.saturating_add(u64::from(length));
        let node = content.lower_node().ok_or(Errno::ENOSPC)?;
        Counters::add(&self.shared.counters.read_through, 1);
        let mut pieces: Vec<Piece> = Vec::new();
        for run in content.missing(&range) {
            pieces.extend(caller.killable(self.shared.fetch(node, run)).await?);
        }
        content.read_with(offset, length, &pieces).map_err(of_io)?.ok_or(Errno::EIO)
    }

    /// Writes, fetching the edges that the write covers only in part.
    pub(super) async fn write_around(&self, caller: &Caller, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let content = content_of(&self.node)?;
        loop {
            match content.write(offset, data).map_err(of_io)? {
                Written::Done => return Ok(()),
                Written::Needs(edge) => self.ensure_range(caller, edge).await?,
            }
        }
    }
}

/// What is written at a time under the lock of a file, which readers of it wait for: a large read's worth.
const FILL_BYTES: u64 = 256 << 10;

/// Writes pieces into the upper as they come, for the holder of a claim.
struct Filling<'a> {
    file: &'a UpperFile,
    content: &'a Content,
    urgency: Urgency,
    claim: Mutex<Claim>,
    failed: Mutex<Option<Errno>>,
}

impl Filling<'_> {
    fn fill(&self, pieces: &[Piece]) -> Result<(), Errno> {
        let (shared, id) = (&self.file.shared, self.file.node.id);
        shared.counters.came(pieces);
        {
            let mut namespace = shared.lock();
            // Who still reads a file that was removed waits for it; nobody else needs it.
            if self.urgency < Urgency::Foreground && namespace.table.get(id)?.names.is_empty() {
                return Err(Errno::ENOENT);
            }
            namespace.materialize_file(id)?;
        }
        let filled = self.content.fill(pieces).map_err(of_io)?;
        Counters::add(&shared.counters.filled_bytes, filled);
        let start = pieces.iter().map(|piece| piece.offset).min().unwrap_or(0);
        let end = pieces.iter().map(|piece| piece.range().end).max().unwrap_or(0);
        let mut claim = self.claim.lock().expect("no holder of this lock panics");
        claim.land(&(start..end), |window| self.content.first_missing(window).is_none());
        Ok(())
    }

    /// Returns why it wanted no more, if so.
    fn outcome(&self) -> Result<(), Errno> {
        self.failed.lock().expect("no holder of this lock panics").map_or(Ok(()), Err)
    }
}

impl PieceSink for Filling<'_> {
    fn take(&self, pieces: Vec<Piece>) -> ControlFlow<()> {
        let fill = || parts_of(pieces).iter().try_for_each(|part| self.fill(part));
        // Megabytes come for whom nobody waits for, and a disk that is behind puts to sleep whoever writes.
        let filled = if self.urgency < Urgency::Foreground { apart(fill) } else { fill() };
        match filled {
            Ok(()) => ControlFlow::Continue(()),
            Err(errno) => {
                *self.failed.lock().expect("no holder of this lock panics") = Some(errno);
                ControlFlow::Break(())
            }
        }
    }
}

impl Shared {
    async fn fetch(&self, node: NodeId, range: Range<u64>) -> Result<Vec<Piece>, Errno> {
        Counters::add(&self.counters.fetches, 1);
        let pieces = self.lower.fetch(node, range).await.map_err(|error| errno::of_lower(&error))?;
        self.counters.came(&pieces);
        Ok(pieces)
    }
}

/// Groups pieces, and cuts those that are too long, so that no more than [`FILL_BYTES`] are written at a time.
fn parts_of(pieces: Vec<Piece>) -> Vec<Vec<Piece>> {
    let mut parts: Vec<Vec<Piece>> = Vec::new();
    let mut room = 0;
    for mut rest in pieces {
        while !rest.bytes.is_empty() {
            // Cut where units begin: each part is kept by itself.
            let to_cut = (FILL_BYTES - rest.offset % FILL_BYTES) as usize;
            let bytes = rest.bytes.split_to(to_cut.min(rest.bytes.len()));
            let piece = Piece { offset: rest.offset, bytes };
            let length = piece.bytes.len() as u64;
            rest.offset += length;
            match parts.last_mut().filter(|_| length <= room) {
                Some(part) => {
                    part.push(piece);
                    room -= length;
                }
                None => {
                    parts.push(vec![piece]);
                    room = FILL_BYTES - length;
                }
            }
        }
    }
    parts
}

/// Does work that may sleep; where there are several threads, what else this one would do goes on elsewhere.
fn apart<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current() {
        Ok(runtime) if runtime.runtime_flavor() == RuntimeFlavor::MultiThread => {
            tokio::task::block_in_place(work)
        }
        _ => work(),
    }
}

fn content_of(node: &Node) -> Result<&Content, Errno> {
    node.content.as_ref().ok_or(Errno::EISDIR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_at_a_time_has_a_bound_and_begins_where_a_unit_does() {
        let piece = |offset: u64, length: u64| Piece { offset, bytes: vec![1; length as usize].into() };
        let sizes = |pieces| -> Vec<Vec<(u64, usize)>> {
            let parts = parts_of(pieces);
            parts
                .iter()
                .map(|part| part.iter().map(|piece| (piece.offset, piece.bytes.len())).collect())
                .collect()
        };
        assert!(sizes(Vec::new()).is_empty());
        assert_eq!(sizes(vec![piece(0, 8192), piece(65_536, 77)]), [vec![(0, 8192), (65_536, 77)]]);
        let half = FILL_BYTES / 2;
        let large = sizes(vec![piece(half, 2 * FILL_BYTES), piece(0, 4096)]);
        let (half_bytes, full) = (half as usize, FILL_BYTES as usize);
        assert_eq!(
            large,
            [
                vec![(half, half_bytes)],
                vec![(FILL_BYTES, full)],
                vec![(2 * FILL_BYTES, half_bytes), (0, 4096)]
            ]
        );
    }
}
