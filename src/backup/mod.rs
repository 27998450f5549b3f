//! Takes a basebackup: plan, read, hash, compress, seal, pack, upload, commit.
//!
//! ```text
//! source (server in backup mode) ─ data_directory (walk) ─ plan ─▶ pipeline ─▶ packer ─▶ repo
//!                                  state of the last one ─ change ─┘    └ gather: what differs
//! ```
//! `run` does it in order and decides what counts. Whatever fails, nothing does: the outcome is the last object that
//! is created. An incremental basebackup names the pages of earlier ones that are as they were, and is as whole as a
//! full one.

mod error;

mod server_facts;
mod server_identity;
mod source;

mod data_directory;
mod links;
mod plan;

mod change;
mod hints;
mod known_parent;
mod reading;
mod rewriting;
mod site_state;

mod gather;
mod page_cache;
mod page_check;
mod read_pages;
mod read_small;
mod source_file;

mod open_entry;
mod packer;
mod pipeline;
mod remember;

pub mod changed_blocks;
pub mod state;
pub mod wal_summaries;

mod live_directory;
mod origin;
mod run;
mod server_manifest;
mod server_record;
mod wal_wait;

#[cfg(test)]
mod incremental_tests;
#[cfg(test)]
mod tests;

pub use change::{Decision, Incremental, Reason};
pub use data_directory::{Root, SourceFile, SourceTree, WalkOptions};
pub use error::{Error, ErrorKind};
pub use live_directory::read_identity;
pub use origin::Node;
pub use packer::WorkDone;
pub use pipeline::Budget;
pub use plan::{Plan, PlanOptions, StartGroup, Step, plan_copy};
pub use run::{BackupOptions, BackupOutcome, run};
pub use server_facts::{ArchiverStatus, Database, ServerFacts, Tablespace};
pub use server_identity::{Difference, DirectoryIdentity, ServerIdentity, parent_process};
pub use source::{
    BackupSession, Checkpoint, SourceError, StartOptions, Started, Stopped, check_directory, switch_wal,
};
pub use wal_wait::{NeededWal, RepositoryArchive, WalArchive};
