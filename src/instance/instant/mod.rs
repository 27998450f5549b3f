//! A restore whose server runs before everything is there: `restore --instant`.
//!
//! A mount lies over the data directory, and over each tablespace's; the directory beneath is the upper. When everything is
//! local the directory beneath is an ordinary one, and when its server stops the mounts go. It is no clone: the server is
//! the restored primary, with its own ports and its own archive_command.
//!
//! ```text
//! begin     checks, pin, the decision written down      unfinished   what an earlier process has left
//! prepare   settings, before there is a mount           mounts       uppers, mounts, pg_wal; and taking them away
//! supervise the one process while anything is mounted   server_state what the server does, by what it says of itself
//! ending    from an upper to a plain directory          boot_unit    Debian: mounted again before PostgreSQL starts
//! starts    whether, and when, the server is started again    remembered  its mounts, for when they are dead and detached
//! always_read  what the server must never fail to read, on its way
//! debian_cluster  whose data a directory has, by the configurations in /etc
//! ```

pub mod begin;
pub mod boot_unit;
pub mod supervise;
pub mod unfinished;

mod always_read;
mod debian_cluster;
mod ending;
mod error;
mod mounts;
mod prepare;
mod remembered;
mod running;
mod server_state;
mod starts;

pub use error::InstantError;
