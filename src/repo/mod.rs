//! The repository format: what an object is called, how it is sealed, how it is read in parts.
//!
//! The only module that puts `codec` and `storage` together. `docs/format.md` is the specification. From the
//! outside in: a [`Repository`] is one site; a [`BasebackupWriter`] fills packs and commits a [`Basebackup`], whose
//! files a [`FileReader`] serves by range; [`wal_object`] archives WAL. From the inside out: `wire` and `header`
//! are bytes, `sealed` and `pack` seal them, `page_map`, `file_table` and `manifest` say where a page is.
//! Deliberately absent: which basebackups there are (`catalog`), how data is read from a server (`backup`), and any
//! deletion.

pub mod id;
pub mod layout;
pub mod wire;

mod header;
mod identity;
pub mod keyring;
mod raw_buffers;
mod raw_content;
mod sealed;
mod signed;
mod text_forms;

pub mod chunk;
mod pack;
pub mod page_map;

pub mod entry;
mod file_table;
pub mod manifest;
mod map_writer;
mod named_chunks;
mod pack_presence;
mod refs;

pub mod documents;
mod membership;
mod repository;

mod basebackup;
mod basebackup_writer;
pub mod builder;
mod chunk_cache;
mod chunk_runs;
mod fetch_plan;
mod file_reader;
mod flights;
pub mod lease;
mod transfers;
pub mod wal_object;

mod archive_head;
pub mod carried_wal;
pub mod forced_index;
mod wal_forced;
mod wal_parts;
pub mod wal_piece;
mod wal_reading;
mod wal_sealing;
mod wal_target;

mod error;
#[cfg(test)]
mod fetch_tests;
#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod writing_tests;

pub use basebackup::{BLOCKS_AHEAD, Basebackup, read_begin, read_manifest_start, read_outcome, read_refs};
pub use basebackup_writer::{BasebackupWriter, BeginOptions, Committed, Completion, ParentBasebackup};
pub use chunk_runs::{
    ChunkRun, RUN_BYTES_MAX, RunLimits, StoredRun, plan_runs, plan_runs_within, runs_expected,
};
pub use error::{Error, ErrorKind};
pub use file_reader::{FileReader, Piece, PieceTaker};
pub use file_table::{content_tag, decode_content, encode_content};
pub use flights::{Claim, Flights};
pub use id::{BasebackupId, ClusterId, HeadId, PackId};
pub use keyring::{Keyring, KeyringOptions};
pub use map_writer::{FileMap, MapWriter};
pub use membership::Membership;
pub use named_chunks::NamedChunks;
pub use pack::{Pack, PackBuilder};
pub use pack_presence::missing_packs;
pub use raw_content::RawContent;
pub use refs::{PackRecord, Refs};
pub use repository::{Repository, RepositoryOptions};
pub use sealed::{CompressedFrame, FrameKind};
pub use transfers::{Transfers, Urgency};
