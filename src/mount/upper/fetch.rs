//! Getting content from the lower: the core that FUSE, a hydrator and another adapter stand on.
//!
//! `ensure_range` makes a range local: claim its windows, so that nobody else fetches them; look again, because
//! somebody just may have; fetch what is missing; write it where it is still missing; and check that it now is local,
//! because an answer that falls short must be an error and never zeros (failure 36). When the disk is full, a read is
//! answered from what was fetched without keeping it: PostgreSQL's own writes need the room more.

use std::ops::Range;

use bytes::Bytes;
use nix::errno::Errno;

use crate::mount::caller::Caller;
use crate::mount::errno;
use crate::mount::lower::{LowerError, NodeId, Piece};
use crate::mount::upper::Shared;
use crate::mount::upper::content::{Content, Written};
use crate::mount::upper::namespace::of_io;
use crate::mount::upper::node::Node;
use crate::mount::upper::stats::Counters;
use crate::mount::upper::volume::UpperFile;

impl UpperFile {
    /// Makes a range of the file local; what lies beyond what the lower has is local already.
    pub async fn ensure_range(&self, caller: &Caller, range: Range<u64>) -> Result<(), Errno> {
        let content = content_of(&self.node)?;
        if !content.is_mapped() {
            self.shared.lock().materialize_file(self.node.id)?;
        }
        let Some(node) = content.lower_node() else { return Ok(()) };
        // The common case: no wait, no allocation, one look at the map.
        if content.first_missing(&range).is_none() {
            return Ok(());
        }
        Counters::add(&self.shared.counters.waits, 1);
        caller.killable(self.fetch_missing(node, content, range)).await
    }

    async fn fetch_missing(&self, node: NodeId, content: &Content, range: Range<u64>) -> Result<(), Errno> {
        while let (Some(first), Some(last)) = {
            let missing = content.missing(&range);
            (missing.first().cloned(), missing.last().cloned())
        } {
            let hull = first.start..last.end;
            let claim = self.shared.flights.claim(node, hull.clone()).await;
            for claimed in claim.runs_in(&hull) {
                for run in content.missing(&claimed) {
                    let pieces = self.shared.fetch(node, run.clone()).await?;
                    self.shared.lock().materialize_file(self.node.id)?;
                    let filled = content.fill(&pieces).map_err(of_io)?;
                    Counters::add(&self.shared.counters.filled_bytes, filled);
                    if let Some(gap) = content.first_missing(&run) {
                        let detail = format!("a fetch of bytes {run:?} of {node:?} left {gap:?} uncovered");
                        return Err(errno::of_lower(&LowerError::Contract { detail }));
                    }
                }
            }
        }
        Ok(())
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

impl Shared {
    async fn fetch(&self, node: NodeId, range: Range<u64>) -> Result<Vec<Piece>, Errno> {
        Counters::add(&self.counters.fetches, 1);
        let pieces = self.lower.fetch(node, range).await.map_err(|error| errno::of_lower(&error))?;
        Counters::add(&self.counters.pieces, pieces.len() as u64);
        Counters::add(
            &self.counters.fetched_bytes,
            pieces.iter().map(|piece| piece.bytes.len() as u64).sum(),
        );
        Ok(pieces)
    }

    /// Puts a file on stable storage, and its place in the upper: who had it in the lower never had to create it, and
    /// will not sync its directory.
    pub(super) fn sync_file(&self, node: &Node, data_only: bool) -> Result<(), Errno> {
        let content = content_of(node)?;
        let file = {
            let mut namespace = self.lock();
            match content.file() {
                Some(file) => file,
                // Nothing was ever written to it.
                None if !namespace.table.get(node.id)?.in_upper => return Ok(()),
                None => namespace.open_in_upper(node.id)?,
            }
        };
        file.sync(data_only).map_err(of_io)?;
        self.lock().make_durable(node.id)
    }
}

fn content_of(node: &Node) -> Result<&Content, Errno> {
    node.content.as_ref().ok_or(Errno::EISDIR)
}
