//! Basebackups as file systems: the read-only tree, and the writable upper above it.
//!
//! ```text
//! fuse            kernel requests to operations, and back: the only folder that names fuser
//! tree            one inode space over virtual directories and volumes
//! virtual_dir     directories answered one name at a time: the WAL archive, the list of basebackups
//! lower_volume    a basebackup's tree, read-only        upper    the same, writable, above a local directory
//! lower           the seam to the repository: a tree whose contents arrive on demand
//! ```
//!
//! Everything below `fuse` runs without a mount and is tested so. The mount never interprets WAL to change data:
//! PostgreSQL replays it. `upper` fetches what a reader is about to read ahead of it, `upper::hydrate` brings the rest of
//! a basebackup in the background, in the order that `pack_order` knows, and `fuse` passes a file through once nothing of
//! it has to be fetched. Deliberately absent: prefetch by what the WAL will read.

pub mod fs;
pub mod lower;

pub mod caller;
pub mod errno;
pub mod mounting;
pub mod patience;
pub mod tree;
pub mod virtual_dir;

mod basebackup_dir;
mod inventory;
mod open_basebackups;
pub mod pack_order;
pub mod repo_lower;
mod restoring;
pub mod site_tree;
mod wal_beginnings;
pub mod wal_dir;
mod wal_evidence;
mod wal_file;

pub mod lower_volume;
pub mod memory_lower;
pub mod upper;

mod fuse;
pub mod holders;
mod listing;
mod single_flight;

pub(crate) use fuse::ANSWERING_THREADS;
pub use mounting::{MountError, MountOptions, Mounted, mount, unmount};
pub use tree::Tree;
