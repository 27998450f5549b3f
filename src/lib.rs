//! Walden: PostgreSQL backups that are file systems you can start PostgreSQL on.
//!
//! The modules stand in layers, listed here from the lowest to the highest; a module names only rows
//! below its own (`docs/architecture.md` has the table and the invariants, `tests/tidy.rs` checks it).
//! Reading order for a newcomer: `pg` for the vocabulary, `repo` for the format, `backup` and `mount`
//! for what is done with it, `instance` for the point of it all.

pub mod clock;
pub mod disk;
pub mod memory;
pub mod monitor;
pub mod pg;

pub mod codec;
pub mod control;
pub mod replication;
pub mod storage;

pub mod repo;

pub mod catalog;

pub mod backup;
pub mod mount;
pub mod restore;
pub mod wal;

pub mod instance;
pub mod site;

pub mod daemon;

pub mod config;

pub mod cli;
