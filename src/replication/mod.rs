//! The wire to PostgreSQL: the one SQL session all use, and the stream of WAL.
//!
//! ```text
//! ConnectOptions ── conninfo ── service_file ── settings ── password_file ── Target
//!                                                                 │
//!                            Session ◀── connection ◀── tls ◀── socket
//!          WalStream ◀── wire ◀── login ◀──┘
//!         BaseBackup ◀──┘
//! ```
//!
//! `settings` decides what to connect to as libpq would and touches no network; `connection` tries it. A session is
//! dedicated: no pooler, no server-side timeouts, and once lost it stays lost. The caller of this module never sees a
//! type of the PostgreSQL crates. Deliberately absent: reading the environment (`config` passes PG* on), a pool of
//! connections, and what is in the archives that BASE_BACKUP sends.

pub mod base_backup;
pub mod connection;
pub mod error;
pub mod manifest_upload;
pub mod row;
pub mod session;
pub mod wal_message;
pub mod wal_stream;

mod conninfo;
mod login;
mod password_file;
mod service_file;
mod settings;
mod socket;
mod tls;
mod wire;

pub use base_backup::{BaseBackup, BaseBackupEnd, BaseBackupOptions, BaseBackupPart, BaseBackupTablespace};
pub use connection::ConnectOptions;
pub use error::{Error, ErrorKind};
pub use manifest_upload::ManifestUpload;
pub use row::{Param, Row};
pub use session::{ServerRole, Session};
pub use wal_message::{StandbyStatus, WalMessage};
pub use wal_stream::{
    NextTimeline, PhysicalSlot, ReplicationConnection, Started, Streamed, SystemIdentity, WalStream,
};
