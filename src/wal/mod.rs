//! WAL in and out: one file pushed to the archive, one fetched back, all of it received by streaming, and a list.
//!
//! `push` is the archive_command and `fetch` the restore_command; both are run by the server for every single file,
//! so they start quickly and do one thing. `plan_file` is the recovery plan as it lies in a data directory,
//! `key_rotation` the key of a process that archives for long, `queue` the limit of what may wait for the archive, and
//! `left_out` what was left out of it for that. `head` writes down how far the archive reaches, when `head_notes` says
//! so. `receive` runs for long and keeps what is on its way in the `spool`. `written_ahead` is what another process has
//! written for a fetch before it begins.
//! `check` looks whether all is there that a recovery may ask for, and puts back what the server still has.
//! Deliberately absent: exit statuses (`cli`), the decision what a name is answered (`catalog`) and any deletion.

pub mod archive;
pub mod check;
mod data_directory;
mod error;
pub mod fetch;
pub mod head;
pub mod head_notes;
pub mod key_rotation;
pub mod last_request;
pub mod left_out;
pub mod list;
pub mod plan_file;
pub mod push;
pub mod queue;
pub mod receive;
mod spool;
pub mod written_ahead;

pub use error::{Error, ErrorKind};

#[cfg(test)]
mod tests;
