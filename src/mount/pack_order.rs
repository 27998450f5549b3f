//! Where the files of a basebackup lie in its packs, for a hydrator: the start-up set, the order of packs, and small
//! files that come together by one request.
//!
//! Files are known by the numbers of the file table, which `repo_lower` numbers its nodes by, whatever part it shows. A
//! file is where its first chunk is: a backup writes a file's chunks one behind the other.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::mount::lower::{LowerError, NodeId};
use crate::mount::repo_lower::lower_error;
use crate::mount::upper::hydrate::{Place, StoredOrder};
use crate::repo::chunk::ChunkRef;
use crate::repo::entry::{Content, Entry, Node};
use crate::repo::id::PackId;
use crate::repo::manifest::PackRange;
use crate::repo::page_map::PageSource;
use crate::repo::{self, FileReader};

/// The order in which a basebackup's files are stored.
#[derive(Debug)]
pub struct PackOrder {
    reader: Arc<FileReader>,
}

impl PackOrder {
    /// Tells of the basebackup of a reader.
    pub fn new(reader: Arc<FileReader>) -> Self {
        Self { reader }
    }
}

#[async_trait::async_trait]
impl StoredOrder for PackOrder {
    async fn places(&self) -> Result<HashMap<NodeId, Place>, LowerError> {
        let basebackup = self.reader.basebackup();
        let mut first_chunks: Vec<(NodeId, PackId, u32)> = Vec::new();
        let visited = basebackup.visit_entries(|number, entry| {
            let chunk = first_chunk(entry);
            first_chunks.extend(chunk.map(|chunk| (NodeId(number), chunk.pack, chunk.offset)));
            Ok::<_, repo::Error>(())
        });
        visited.await.map_err(|error| lower_error(&error))?;
        Ok(places(&first_chunks, &basebackup.start().start_set))
    }

    async fn load(&self, files: &[NodeId]) -> Result<(), LowerError> {
        let mut entries = Vec::with_capacity(files.len());
        for file in files {
            let found = self.reader.basebackup().entry_by_number(file.0).await;
            entries.extend(found.map_err(|error| lower_error(&error))?);
        }
        self.reader.load_together(&entries).await.map_err(|error| lower_error(&error))
    }
}

/// Returns the chunk that a file begins with; none where it needs no pack.
fn first_chunk(entry: &Entry) -> Option<ChunkRef> {
    let Node::File { content, .. } = &entry.node else { return None };
    match content {
        Content::Inline(_) => None,
        Content::Part(blob) => Some(blob.chunk),
        Content::Map(block) => block.extents().iter().find_map(|extent| match &extent.source {
            PageSource::Chunk { chunk, .. } => Some(*chunk),
            PageSource::Zero => None,
        }),
        // Its pages lie near the blocks of its map.
        Content::Blocks(blobs) => blobs.first().map(|blob| blob.chunk),
    }
}

fn places(first_chunks: &[(NodeId, PackId, u32)], start_set: &[PackRange]) -> HashMap<NodeId, Place> {
    let packs: BTreeSet<PackId> = first_chunks.iter().map(|(_, pack, _)| *pack).collect();
    let ranks: HashMap<PackId, u32> = packs.into_iter().zip(0..).collect();
    let place = |(node, pack, offset): &(NodeId, PackId, u32)| {
        let holds = |range: &PackRange| range.pack == *pack && (range.from..range.to).contains(offset);
        let start_set = start_set.iter().position(holds).and_then(|at| u32::try_from(at).ok());
        (*node, Place { start_set, pack: ranks[pack], offset: *offset })
    };
    first_chunks.iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::BasebackupId;

    #[test]
    fn files_lie_in_the_order_of_packs_and_the_start_up_set_in_its_own() {
        let origin: BasebackupId = "20261120T101500Z-3fa9".parse().unwrap();
        let pack = |number| PackId { origin, number };
        let range = |number, from, to| PackRange { pack: pack(number), from, to };
        let chunks = [
            (NodeId(1), pack(4), 0),
            (NodeId(2), pack(2), 70),
            (NodeId(3), pack(2), 50),
            (NodeId(4), pack(9), 10),
        ];
        let places = places(&chunks, &[range(9, 0, 11), range(2, 60, 71)]);
        let place = |start_set, pack, offset| Place { start_set, pack, offset };
        assert_eq!(places[&NodeId(1)], place(None, 1, 0));
        assert_eq!(places[&NodeId(2)], place(Some(1), 0, 70));
        assert_eq!(places[&NodeId(3)], place(None, 0, 50));
        assert_eq!(places[&NodeId(4)], place(Some(0), 2, 10));
    }
}
