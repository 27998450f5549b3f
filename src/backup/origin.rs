//! Which server a basebackup is taken from: all nodes are asked, the first that fits is taken.
//!
//! A node fits whose data directory is on this host and readable, and which archives WAL. Nodes in the role they are
//! preferred in come first, then the others, each in the order of the configuration; so after a failover the
//! basebackup goes on with the other node, and a primary that came back as a standby is passed over.

use std::path::{Path, PathBuf};

use crate::backup::error::Error;
use crate::backup::live_directory::{read_control_file, read_identity};
use crate::backup::run::blocking;
use crate::backup::server_facts::ServerFacts;
use crate::backup::source::{SourceError, check_directory};
use crate::disk::CloneMarker;
use crate::pg::ControlFile;
use crate::replication::{ConnectOptions, ServerRole, Session};
use crate::repo::ClusterId;

/// A server that a basebackup may be taken from.
#[derive(Debug, Clone)]
pub struct Node {
    /// How to reach it.
    pub connection: ConnectOptions,
    /// The role in which it comes before the other nodes.
    pub preferred: ServerRole,
}

/// What is known of the server and its directory before anything is written.
#[derive(Clone)]
pub(super) struct Origin {
    pub(super) facts: ServerFacts,
    pub(super) data_directory: PathBuf,
    pub(super) control: ControlFile,
    pub(super) cluster: ClusterId,
}

/// The server that was chosen, and how to reach the one it follows.
pub(super) struct Chosen<O> {
    pub(super) connection: ConnectOptions,
    pub(super) session: Session,
    pub(super) origin: O,
    /// Where the server is a standby and another node is its primary: the only one that can end a WAL segment.
    pub(super) primary: Option<Session>,
}

pub(super) const PAGE_BYTES: u32 = 8192;

/// Connects to the server whose data directory the basebackup is taken from, and refuses what cannot become one.
///
/// # Errors
/// Of several nodes, what spoke against the first in the order of preference.
pub(super) async fn choose_origin(
    nodes: &[Node],
    data_directory: Option<&Path>,
    wal_received: bool,
) -> Result<Chosen<Origin>, Error> {
    choose(nodes, async |_: &Session, facts: ServerFacts| {
        origin_of(facts, data_directory, wal_received).await
    })
    .await
}

/// Connects to the first server in which `look` finds nothing against it.
pub(super) async fn choose<O>(
    nodes: &[Node],
    look: impl AsyncFn(&Session, ServerFacts) -> Result<O, Error>,
) -> Result<Chosen<O>, Error> {
    let mut answered = Vec::new();
    let mut refused = None;
    for node in nodes {
        match ask(&node.connection).await {
            Ok((session, facts)) => answered.push((node, session, facts)),
            Err(error) => keep_first(&mut refused, error, nodes.len()),
        }
    }
    // Stable: the order of the configuration decides between equals.
    answered.sort_by_key(|(node, _, facts)| role(facts) != node.preferred);
    if !answered.is_empty() {
        // One that answers says more about what is wrong than one that does not.
        refused = None;
    }
    for at in 0..answered.len() {
        match look(&answered[at].1, answered[at].2.clone()).await {
            Ok(origin) => {
                let (node, session, facts) = answered.swap_remove(at);
                let follows = |other: &ServerFacts| {
                    let same = other.identity.system_identifier == facts.identity.system_identifier;
                    same && role(&facts) == ServerRole::Standby && role(other) == ServerRole::Primary
                };
                let primary = answered.into_iter().find(|(_, _, other)| follows(other));
                let (connection, primary) = (node.connection.clone(), primary.map(|(_, session, _)| session));
                return Ok(Chosen { connection, session, origin, primary });
            }
            Err(error) => keep_first(&mut refused, error, nodes.len()),
        }
    }
    Err(refused.unwrap_or(Error::NoNode))
}

fn role(facts: &ServerFacts) -> ServerRole {
    if facts.identity.in_recovery { ServerRole::Standby } else { ServerRole::Primary }
}

fn keep_first(refused: &mut Option<Error>, error: Error, nodes: usize) {
    if nodes > 1 {
        tracing::info!("a node is passed over: {error}");
    }
    refused.get_or_insert(error);
}

async fn ask(connection: &ConnectOptions) -> Result<(Session, ServerFacts), Error> {
    let session = Session::connect(connection).await.map_err(SourceError::from)?;
    let facts = ServerFacts::gather(&session).await?;
    Ok((session, facts))
}

/// Looks at the directory of a server.
async fn origin_of(
    facts: ServerFacts,
    data_directory: Option<&Path>,
    wal_received: bool,
) -> Result<Origin, Error> {
    let data_directory = data_directory.unwrap_or_else(|| facts.data_directory()).to_owned();
    if let Some(marker) = CloneMarker::detect(&data_directory)? {
        return Err(Error::Clone { path: data_directory, clone: marker.name });
    }
    let directory = data_directory.clone();
    let (identity, control) =
        blocking(move || Ok((read_identity(&directory)?, read_control_file(&directory)?.2))).await?;
    check_directory(&facts.identity, &identity)?;
    if control.block_size != PAGE_BYTES {
        return Err(Error::BlockSize(control.block_size));
    }
    if !wal_received {
        check_archiving(&facts)?;
    }
    for unreadable in &facts.unreadable {
        tracing::warn!("the role may not see {unreadable}");
    }
    let cluster =
        ClusterId { system_identifier: control.system_identifier, segment_size: control.wal_segment_size };
    Ok(Origin { facts, data_directory, control, cluster })
}

/// A primary without archiving would only be found out after hours of copying.
pub(super) fn check_archiving(facts: &ServerFacts) -> Result<(), Error> {
    if facts.identity.in_recovery {
        return Ok(());
    }
    if !facts.archives() {
        return Err(Error::NotArchiving { reason: "archive_mode is off" });
    }
    let is_empty = |name| facts.setting(name).is_none_or(str::is_empty);
    if is_empty("archive_command") && is_empty("archive_library") {
        return Err(Error::NotArchiving { reason: "archive_command is empty" });
    }
    Ok(())
}
