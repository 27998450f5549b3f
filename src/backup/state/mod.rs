//! The state: what the last basebackup knew of every file and every page, on the host that took it.
//!
//! ```text
//! <state>/basebackups/<site>/lock
//!                           /<basebackup id>.pages              what the next basebackup compares with
//!                           /<basebackup id>.pages.unfinished   being written
//!                           /<basebackup id>.pages.journal      what a killed full basebackup can go on with
//! ```
//! A writer appends blocks of page hashes while a basebackup runs and renames its file after the commit; a crash
//! leaves the old state or the new one. A reader streams files in order, looks one up by its path, and reads what is
//! known of 16384 pages at a time: nothing grows with the cluster but the list of index blocks. Every byte is under a
//! checksum that also says where it stands and of which basebackup it is; what does not match is damage, and costs the
//! next basebackup reading and storing, never a wrong page. Deliberately absent: what follows from it (`change`).

mod error;
mod format;

mod folder;
mod journal;
mod reader;
mod sorter;
mod writer;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;

use bytes::Bytes;
use jiff::Timestamp;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::codec::{Digest, Random, RandomExt};
use crate::pg::{Crc32c, Lsn, TimelineId};
use crate::repo::{
    BasebackupId, ClusterId, PackId,
    entry::{BlobRef, Content, TreePath},
    page_map::{MAP_BLOCK_PAGES, MapBlock, PAGE_SIZE, PageSource},
};

pub use error::{StateError, StateErrorKind};
pub use folder::{BackupLock, StateFolder};
pub use journal::{Attempt, Journal};
pub use reader::State;
pub use writer::StateWriter;

/// What is known of the basebackup as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateFacts {
    /// The site.
    pub site: Uuid,
    /// The basebackup whose files and pages these are.
    pub basebackup: BasebackupId,
    /// BLAKE3 of its `backup.json`: the state is of no use with any other.
    pub backup_json: Digest,
    /// The cluster it was taken of.
    pub cluster: ClusterId,
    /// The timeline it was taken on.
    pub timeline: TimelineId,
    /// Where it began.
    pub start_lsn: Lsn,
    /// Where it ended.
    pub stop_lsn: Lsn,
    /// When it began, by this host's clock: a file whose ctime is near it may have changed unseen.
    pub started_at: Timestamp,
    /// Whether pages carry checksums.
    pub has_checksums: bool,
    /// Cipher and recipients, as `repo` tells them apart.
    pub sealing: Digest,
    /// Pages that are gathered into one chunk.
    pub chunk_pages: u32,
    /// What page hashes are keyed with, drawn anew for each full basebackup.
    pub hash_key: HashKey,
    /// How many basebackups ago every file was read.
    pub since_read_all: u32,
}

/// What is known of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownFile {
    /// Where it stands in the basebackup.
    pub path: TreePath,
    /// Its bytes, as stored.
    pub size: u64,
    /// Its inode when it was read.
    pub inode: u64,
    /// The device of that inode.
    pub device: u64,
    /// Its ctime when it was opened.
    pub changed: Timestamp,
    /// CRC of all its bytes, for `backup_manifest`; none where not all of them were seen at once.
    pub crc: Option<Crc32c>,
    /// Pages of it whose checksum was wrong.
    pub damaged_pages: u32,
    /// What it holds, and where that stands.
    pub content: KnownContent,
}

/// What is known of a file's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KnownContent {
    /// They stand in the file table.
    Inline(Bytes),
    /// They stand in one chunk with those of others.
    Part { blob: BlobRef, hash: PageHash },
    /// They are pages: how the entry names them ([`Content::Map`] or [`Content::Blocks`]), and where what is known of
    /// each [`MAP_BLOCK_PAGES`] of them stands in the state, in order.
    Pages { stands: Content, records: Vec<RecordAt> },
}

/// What is known of up to [`MAP_BLOCK_PAGES`] neighbouring pages of a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KnownBlock {
    /// Where each page stands.
    pub map: MapBlock,
    /// The hash of each page.
    pub hashes: Vec<PageHash>,
}

/// Where a [`KnownBlock`] stands in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordAt {
    /// First byte in the file.
    pub offset: u64,
    /// Bytes, checksum included.
    pub len: u32,
}

/// The first 8 bytes of the keyed BLAKE3 of a page, or of a file that takes no page.
///
/// Compared only with the hash that the same page had before, so a chance match takes 2^64 changed pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageHash(pub [u8; 8]);

/// What page hashes are keyed with, so that who can write rows cannot look for two pages of one hash.
#[derive(Clone, PartialEq, Eq)]
pub struct HashKey(Zeroizing<[u8; 32]>);

impl HashKey {
    /// Draws a key.
    pub fn generate(random: &dyn Random) -> Self {
        Self(Zeroizing::new(random.array()))
    }

    /// Computes the hash of a page; the last one of a file may be short.
    pub fn hash(&self, page: &[u8]) -> PageHash {
        let [a, b, c, d, e, f, g, h, ..] = *Digest::salted(&self.0, page).as_bytes();
        PageHash([a, b, c, d, e, f, g, h])
    }
}

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey")
    }
}

impl KnownFile {
    /// Returns how many blocks of pages are known of the file.
    pub fn block_count(&self) -> u64 {
        match &self.content {
            KnownContent::Pages { records, .. } => records.len() as u64,
            KnownContent::Inline(_) | KnownContent::Part { .. } => 0,
        }
    }

    /// Returns how many pages its block `n` has: [`MAP_BLOCK_PAGES`], or what is left in the last one.
    pub fn pages_of_block(&self, n: u64) -> u32 {
        let pages = self.size.div_ceil(PAGE_SIZE);
        pages.saturating_sub(n.saturating_mul(MAP_BLOCK_PAGES)).min(MAP_BLOCK_PAGES) as u32
    }
}

impl KnownBlock {
    /// Returns the packs that any of its pages stands in.
    pub fn packs(&self) -> BTreeSet<PackId> {
        let of = |source: &PageSource| match source {
            PageSource::Zero => None,
            PageSource::Chunk { chunk, .. } => Some(chunk.pack),
        };
        self.map.extents().iter().filter_map(|extent| of(&extent.source)).collect()
    }
}
