//! A site and its servers as a whole: setting up, checking, and following a cluster over pg_upgrade.
//!
//! `check` proves rather than reads: a store by an object that is created, read and removed, the archive by a segment
//! that is ended, waited for and read back. Each answer is an [`Item`], and a failed one stops nothing but what stands
//! on it. Deliberately absent: the configuration and this host's keys, which `cli` looks at.

mod item;

mod data_files;
mod receiving;
mod server;
mod settings;
mod store;
mod wal_round_trip;

mod archive_settings;
mod upgrade;

pub use archive_settings::{ArchiveCommand, Setting, wanted_settings};
pub use item::{Item, Status, describe};
pub use server::{CheckedServer, NodeOptions, check_cluster, check_server, cluster_of};
pub use store::check_store;
pub use upgrade::{UpgradeError, Upgraded, upgrade};
pub use wal_round_trip::check_wal_round_trip;
