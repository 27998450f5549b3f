//! The wire to PostgreSQL: the one SQL session all use.
//!
//! ```text
//! ConnectOptions ── conninfo ── service_file ── settings ── password_file ── Target
//!                                                                 │
//!                            Session ◀── connection ◀── tls ◀── socket
//! ```
//!
//! `settings` decides what to connect to as libpq would and touches no network; `connection` tries it. A session is
//! dedicated: no pooler, no server-side timeouts, and once lost it stays lost. The caller of this module never sees a
//! type of the PostgreSQL crates. Deliberately absent: reading the environment (`config` passes PG* on), a pool of
//! connections, and the replication protocol itself (BASE_BACKUP, START_REPLICATION).

pub mod connection;
pub mod error;
pub mod row;
pub mod session;

mod conninfo;
mod password_file;
mod service_file;
mod settings;
mod socket;
mod tls;

pub use connection::ConnectOptions;
pub use error::{Error, ErrorKind};
pub use row::{Param, Row};
pub use session::{ServerRole, Session};
