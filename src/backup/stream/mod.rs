//! A basebackup through the server: BASE_BACKUP, for a host that need not have the data directory.
//!
//! ```text
//! origin (ask, by SQL) ─ receive (archives ─▶ files ─▶ work) ─ copy (CPU pool) ─▶ packer ─▶ repo
//!                             └ tar_reader     └ manifest (what the server has summed up) ◀──┘
//! ```
//! The order is the server's: tablespaces, then the data directory, `pg_control` last. What a start needs goes into
//! packs of its own on the way. All of it comes each time, and what is as it was in the last basebackup is named where
//! it stands; from 17 on the server sends only what has changed, where it has the summaries of its WAL (`partial`).
//! Deliberately absent: reading a page again, which the server does where its checksum is wrong.

mod error;

mod histories;
mod origin;
mod outside;

mod changes;
mod manifest;
mod parent_manifest;
mod partial;
mod receive;
mod start_set;
mod tar_reader;
mod work;

mod copy;
mod run;
mod server;

#[cfg(test)]
mod model_tests;

pub use error::StreamError;
pub(super) use run::run;
