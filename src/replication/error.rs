//! What can go wrong between Walden and a PostgreSQL server.
//!
//! The distinction that matters most is between a session that is *lost* and a statement the server *refused*: after
//! the first nothing is known about what the server did, after the second everything is. A lost session is never
//! reconnected here, because what was bound to it (a running basebackup) is gone with it.

use std::path::PathBuf;

/// Says what failed, with the facts as fields.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The connection string, a service file or a PG* variable cannot be used as written.
    #[error("connection settings: {detail}")]
    Settings { detail: String },
    /// A file the connection settings name cannot be read.
    #[error("could not read \"{}\": {detail}", path.display())]
    File { path: PathBuf, detail: String },
    /// No server answered at the address.
    #[error("could not connect to {address}: {detail}")]
    Unreachable { address: String, detail: String },
    /// A server answered but takes no connections now: it is starting, stopping or recovering.
    #[error("server at {address} does not accept connections: {message}")]
    NotAccepting { address: String, message: String },
    /// TLS was required and could not be had.
    #[error("could not secure the connection to {address}: {detail}")]
    Tls { address: String, detail: String },
    /// The server refused who we are.
    #[error("server at {address} refused user \"{user}\": {message}")]
    AuthenticationFailed { address: String, user: String, message: String },
    /// The server is none that `target_session_attrs` asks for.
    #[error("server at {address} is not what target_session_attrs={wanted} asks for")]
    WrongServer { address: String, wanted: String },
    /// The server is older or newer than Walden knows.
    #[error("server at {address} is PostgreSQL {version}: 13 to 18 are supported")]
    WrongVersion { address: String, version: String },
    /// Something between us and the server hands our statements to sessions of its own choosing.
    #[error("connection to {address} goes through a pooler")]
    Pooled { address: String },
    /// The session ended under us; what it had begun on the server is undone.
    #[error("session with the server was lost: {detail}")]
    Lost { detail: String },
    /// The server refused a statement.
    #[error("{message}{}", detail.as_deref().map(|d| format!(" ({d})")).unwrap_or_default())]
    Sql { sqlstate: String, message: String, detail: Option<String>, hint: Option<String> },
    /// The server answered something else than the statement's columns promise.
    #[error("unexpected answer from the server: {detail}")]
    Unexpected { detail: String },
}

/// Sorts errors by what the caller can do about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The same call may succeed later.
    Retry,
    /// The configuration, the server's rights or the statement has to change first.
    Input,
    /// Walden and the server do not understand each other.
    Bug,
}

impl Error {
    /// Returns what a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unreachable { .. } | Self::NotAccepting { .. } | Self::Lost { .. } => ErrorKind::Retry,
            Self::Sql { sqlstate, .. } if is_transient(sqlstate) => ErrorKind::Retry,
            Self::Settings { .. }
            | Self::File { .. }
            | Self::Tls { .. }
            | Self::AuthenticationFailed { .. }
            | Self::WrongServer { .. }
            | Self::WrongVersion { .. }
            | Self::Pooled { .. }
            | Self::Sql { .. } => ErrorKind::Input,
            Self::Unexpected { .. } => ErrorKind::Bug,
        }
    }

    /// Returns a sentence that says what to do, where there is one.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Unreachable { .. } => {
                "Is the server running there, and does it listen on that socket or port?"
            }
            Self::AuthenticationFailed { message, .. } if message.starts_with("Peer authentication") => {
                "Run Walden as that operating system user or as root, or add a line for this user to pg_hba.conf."
            }
            Self::AuthenticationFailed { message, .. } if message.contains("password missing") => {
                "Put the password in a .pgpass file (mode 0600), a service file or PGPASSWORD."
            }
            Self::AuthenticationFailed { .. } => "Check user, password and the server's pg_hba.conf.",
            Self::Pooled { .. } => {
                "Connect to the server itself: a basebackup is bound to one session of one server."
            }
            Self::Tls { .. } => "Check sslmode and sslrootcert.",
            Self::Sql { hint, .. } => return hint.clone(),
            _ => return None,
        };
        Some(hint.to_owned())
    }

    /// Returns the SQLSTATE of a refused statement.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Sql { sqlstate, .. } => Some(sqlstate),
            _ => None,
        }
    }
}

/// Classes 53 (insufficient resources) and 40 (rollback), and an object or server that is busy.
fn is_transient(sqlstate: &str) -> bool {
    ["53", "40"].iter().any(|class| sqlstate.starts_with(class)) || ["55006", "55P03"].contains(&sqlstate)
}
