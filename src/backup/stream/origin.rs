//! What has to be known of a server before its archives come: all of it by SQL, nothing from a directory.
//!
//! The data directory and the replication connection must be one server's, and a system identifier cannot tell a
//! primary from its standby. So the replication connection is made to the address that the session reached, and the
//! session must then find it among the processes of its own server, by a name that is used once.

use crate::backup::error::Error;
use crate::backup::origin::{PAGE_BYTES, check_archiving};
use crate::backup::server_facts::ServerFacts;
use crate::backup::source::SourceError;
use crate::backup::stream::error::StreamError;
use crate::pg::Lsn;
use crate::replication::{ConnectOptions, Error as SessionError, Param, ReplicationConnection, Session};
use crate::repo::ClusterId;

/// What is known of a server before anything is written.
#[derive(Debug, Clone)]
pub struct RemoteOrigin {
    /// What it says of itself.
    pub facts: ServerFacts,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Where redo would begin now.
    pub redo: Lsn,
    /// Pages of a relation's file.
    pub segment_pages: u32,
    /// Permission bits of its data directory.
    pub directory_mode: u32,
    /// Operating system and architecture, as far as its version tells.
    pub platform: Option<String>,
}

/// SQLSTATE `insufficient_privilege`.
const INSUFFICIENT_PRIVILEGE: &str = "42501";
const FURTHER: &str = "SELECT redo_lsn::text AS redo, current_setting('data_directory_mode') AS mode, \
     version() AS version FROM pg_control_checkpoint()";

impl RemoteOrigin {
    /// Asks a server, and refuses what cannot become a basebackup.
    pub async fn of(session: &Session, facts: ServerFacts, wal_received: bool) -> Result<Self, Error> {
        let number = |name: &str| -> Result<u32, Error> {
            let text = facts.setting(name).unwrap_or_default();
            let refuse = |_| SessionError::Unexpected { detail: format!("setting \"{name}\" is \"{text}\"") };
            Ok(text.parse().map_err(refuse).map_err(SourceError::from)?)
        };
        let block_size = number("block_size")?;
        if block_size != PAGE_BYTES {
            return Err(Error::BlockSize(block_size));
        }
        if !wal_received {
            check_archiving(&facts)?;
        }
        let row = session.query_one(FURTHER, &[]).await.map_err(SourceError::from)?;
        let text = |column: &str| row.text(column).map_err(SourceError::from);
        let mode = u32::from_str_radix(&text("mode")?, 8).unwrap_or(0o700);
        for unreadable in &facts.unreadable {
            tracing::warn!("the role may not see {unreadable}");
        }
        let cluster = ClusterId {
            system_identifier: facts.identity.system_identifier,
            segment_size: facts.wal_segment_size,
        };
        Ok(Self {
            cluster,
            redo: row.parsed("redo").map_err(SourceError::from)?,
            segment_pages: number("segment_size")?,
            directory_mode: mode & 0o777,
            platform: platform(&text("version")?),
            facts,
        })
    }
}

/// Reads `linux x86_64` out of what `version()` says: `PostgreSQL 15.4 on x86_64-pc-linux-gnu, compiled by …`.
fn platform(version: &str) -> Option<String> {
    let (_, built) = version.split_once(" on ")?;
    let triple = built.split(',').next()?;
    let (architecture, system) = triple.split_once('-')?;
    let system = if system.contains("linux") { "linux" } else { system };
    // As Rust names it.
    let architecture = if architecture == "arm64" { "aarch64" } else { architecture };
    Some(format!("{system} {architecture}"))
}

/// Makes a replication connection to the server of `session`.
///
/// # Errors
/// `OtherServer` where the session does not find it.
pub async fn connect(
    connection: &ConnectOptions,
    session: &Session,
    facts: &ServerFacts,
    name: &str,
) -> Result<ReplicationConnection, Error> {
    let server = (session.address(), session.version());
    let connecting = ReplicationConnection::connect_beside(connection, server, name).await;
    let mut replication = connecting.map_err(|error| refusal(error, session.user()))?;
    let other = || StreamError::OtherServer { address: session.address().to_owned() };
    let identity = replication.identify().await.map_err(SourceError::from)?;
    if identity.system_identifier != facts.identity.system_identifier {
        return Err(other().into());
    }
    let sql = "SELECT count(*) AS found FROM pg_stat_activity \
               WHERE application_name = $1 AND backend_type = 'walsender'";
    let row = session.query_one(sql, &[Param::Text(name)]).await.map_err(SourceError::from)?;
    match row.int("found").map_err(SourceError::from)? {
        1 => Ok(replication),
        _ => Err(other().into()),
    }
}

/// Tells a role that lacks a right from everything else that a connection may fail by: the session is there.
fn refusal(error: SessionError, role: &str) -> Error {
    let role = role.to_owned();
    match error {
        SessionError::AuthenticationFailed { message, .. } => {
            StreamError::MayNotReplicate { role, message }.into()
        }
        SessionError::Sql { sqlstate, message, .. } if sqlstate == INSUFFICIENT_PRIVILEGE => {
            StreamError::MayNotReplicate { role, message }.into()
        }
        error => SourceError::from(error).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_platform_is_the_servers() {
        for (version, expected) in [
            ("PostgreSQL 15.4 (Debian) on x86_64-pc-linux-gnu, compiled by gcc", Some("linux x86_64")),
            ("PostgreSQL 18.1 on aarch64-unknown-linux-musl, compiled by gcc", Some("linux aarch64")),
            ("PostgreSQL 15.4", None),
        ] {
            assert_eq!(platform(version).as_deref(), expected, "{version}");
        }
    }
}
