//! Takes a basebackup: plan, read, hash, compress, seal, pack, upload, commit.

mod server_facts;
mod server_identity;
mod source;

pub use server_facts::{ArchiverStatus, Database, ServerFacts, Tablespace};
pub use server_identity::{Difference, DirectoryIdentity, ServerIdentity, parent_process};
pub use source::{
    BackupSession, Checkpoint, SourceError, StartOptions, Started, Stopped, check_directory, switch_wal,
};
