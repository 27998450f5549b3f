//! After pg_upgrade or a new initdb: the new cluster becomes one more of the same site.
//!
//! Nothing of the old one changes. Its names hold its system identifier, so the new cluster's timeline 1 meets none of
//! them, and a roll-back to it goes on where it was (failure 12a).

use crate::backup::{ServerFacts, SourceError};
use crate::replication::{ConnectOptions, Session};
use crate::repo::{self, ClusterId, Repository};
use crate::site::server::cluster_of;

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upgraded {
    /// The cluster of the server that answered.
    pub cluster: ClusterId,
    /// Its version, as it prints it.
    pub version: String,
    /// Whether it is new to the site.
    pub is_new: bool,
    /// The other clusters of the site, which stay.
    pub others: Vec<ClusterId>,
}

/// Why no cluster was accepted.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// The configuration names no server.
    #[error("the site has no server to ask for its system identifier")]
    NoNode,
    /// No server answered; what the first said.
    #[error(transparent)]
    Server(#[from] SourceError),
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] repo::Error),
}

/// Accepts the cluster of the first server that answers.
pub async fn upgrade(repository: &Repository, nodes: &[ConnectOptions]) -> Result<Upgraded, UpgradeError> {
    let facts = first_answer(nodes).await?;
    let cluster = cluster_of(&facts);
    let others = repository.clusters().await?.into_iter().filter(|other| *other != cluster).collect();
    let is_new = repository.accept(cluster).await?;
    Ok(Upgraded { cluster, version: facts.version_text, is_new, others })
}

async fn first_answer(nodes: &[ConnectOptions]) -> Result<ServerFacts, UpgradeError> {
    let mut refused = None;
    for node in nodes {
        match ask(node).await {
            Ok(facts) => return Ok(facts),
            Err(error) => {
                refused.get_or_insert(error);
            }
        }
    }
    Err(refused.map_or(UpgradeError::NoNode, UpgradeError::Server))
}

async fn ask(node: &ConnectOptions) -> Result<ServerFacts, SourceError> {
    let session = Session::connect(node).await?;
    ServerFacts::gather(&session).await
}
