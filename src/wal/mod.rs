//! WAL in and out: one file pushed to the archive, one fetched back, and a list of what is there.
//!
//! `push` is the archive_command and `fetch` the restore_command; both are run by the server for every single file,
//! so they start quickly and do one thing. `plan_file` is the recovery plan as it lies in a data directory,
//! `key_rotation` the key of a process that archives for long, `queue` the limit of what may wait for the archive, and
//! `left_out` what was left out of it for that.
//! Deliberately absent: exit statuses (`cli`), the decision what a name is answered (`catalog`), receiving by
//! streaming and any deletion.

pub mod archive;
mod data_directory;
mod error;
pub mod fetch;
pub mod head;
pub mod key_rotation;
pub mod left_out;
pub mod list;
pub mod plan_file;
pub mod push;
pub mod queue;

pub use error::{Error, ErrorKind};

#[cfg(test)]
mod tests;
