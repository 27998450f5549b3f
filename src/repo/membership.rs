//! Which clusters a site is of, so that nobody archives another server's WAL into it by mistake.
//!
//! The first cluster that writes makes the site its own; another one is refused until `walden site upgrade` accepts it,
//! after pg_upgrade or a new initdb. Accepted clusters stand side by side for ever, so that a roll-back to the old one
//! goes on archiving (failure 12a). One small object says so, created once; a push asks for it and for nothing else.
//! It guards against mistakes and not against attackers: it is not signed, and readers do not look at it.

use serde::Serialize;

use crate::repo::error::Error;
use crate::repo::id::ClusterId;
use crate::repo::repository::Repository;
use crate::storage::ErrorKind;

/// What a cluster is to a site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Membership {
    /// The site is its own, or it was accepted.
    Accepted,
    /// The site has no cluster yet: whoever writes first makes it its own.
    First,
    /// The site is of other clusters.
    Foreign(Vec<ClusterId>),
}

#[derive(Debug, Serialize)]
struct Acceptance {
    cluster: String,
    accepted_at: String,
}

impl Repository {
    /// Returns the clusters that anything was ever stored for.
    pub async fn clusters(&self) -> Result<Vec<ClusterId>, Error> {
        let root = self.layout().clusters();
        let folders = self.store().list_folder(&root).await?.folders;
        let parse = |name: &String| self.layout().parse_cluster_folder(&format!("{root}{name}"));
        Ok(folders.iter().filter_map(parse).collect())
    }

    /// Finds out what a cluster is to this site; writes nothing.
    pub async fn membership(&self, cluster: ClusterId) -> Result<Membership, Error> {
        match self.store().head(&self.layout().accepted(cluster)).await {
            Ok(_) => return Ok(Membership::Accepted),
            Err(error) if error.is_absent() => {}
            Err(error) => return Err(error.into()),
        }
        let known = self.clusters().await?;
        Ok(if known.is_empty() {
            Membership::First
        } else if known.contains(&cluster) {
            Membership::Accepted
        } else {
            Membership::Foreign(known)
        })
    }

    /// Lets the site's own clusters write, and the first one.
    ///
    /// # Errors
    /// `ForeignCluster` for every other.
    pub async fn admit(&self, cluster: ClusterId) -> Result<(), Error> {
        match self.membership(cluster).await? {
            Membership::Accepted => Ok(()),
            Membership::First => self.accept(cluster).await.map(drop),
            Membership::Foreign(known) => Err(Error::ForeignCluster { cluster, known }),
        }
    }

    /// Accepts a cluster; returns whether it was not accepted before.
    pub async fn accept(&self, cluster: ClusterId) -> Result<bool, Error> {
        let acceptance =
            Acceptance { cluster: cluster.to_string(), accepted_at: self.clock().now().to_string() };
        let mut body = serde_json::to_vec(&acceptance).map_err(|error| Error::Internal(error.to_string()))?;
        body.push(b'\n');
        match self.store().create(&self.layout().accepted(cluster), body.into()).await {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
