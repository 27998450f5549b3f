//! The state of a site for one basebackup: locked, read before it, written beside it, saved behind it.
//!
//! The lock keeps two basebackups of one site on one host apart. A state folder that cannot be used is no reason to go
//! without a basebackup: it is said, and the basebackup is full. Nothing here decides; `known_parent` does.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;

use crate::backup::change::{Decision, Reason, Today};
use crate::backup::error::Error;
use crate::backup::gather::CHUNK_PAGES;
use crate::backup::known_parent::{KnownParent, Prepared, prepare};
use crate::backup::run::blocking;
use crate::backup::state::{BackupLock, HashKey, StateError, StateFacts, StateFolder, StateWriter};
use crate::repo::{
    self, BasebackupId, BasebackupWriter, BeginOptions, Committed, Repository, keyring::Audience,
};

/// The state of a site, held for one basebackup.
#[derive(Debug)]
pub struct SiteState {
    /// None where basebackups are not remembered.
    held: Option<(StateFolder, BackupLock)>,
}

/// What was decided, and what the next basebackup has to know of it.
#[derive(Debug)]
pub struct Begun {
    /// Full or incremental, and why.
    pub decision: Decision,
    /// The basebackup that is built upon; none for a full one.
    pub parent: Option<Arc<KnownParent>>,
    /// What page hashes are keyed with; none where nothing is remembered.
    pub hash_key: Option<HashKey>,
    /// When it began, by this host's clock.
    pub at: Timestamp,
}

impl SiteState {
    /// Takes the lock in the folder of a site below `states`; none: nothing is remembered.
    ///
    /// # Errors
    /// Where another process takes a basebackup of the site.
    pub async fn take(repository: &Repository, states: Option<&Path>) -> Result<Self, Error> {
        let Some(states) = states else {
            return Ok(Self { held: None });
        };
        let folder = StateFolder::new(states.join(repository.site().to_string()));
        let locking = folder.clone();
        match blocking(move || Ok(locking.take_lock())).await? {
            Ok(lock) => Ok(Self { held: Some((folder, lock)) }),
            Err(error @ StateError::Busy { .. }) => Err(error.into()),
            Err(error) => {
                tracing::warn!("the basebackup is full, and so will the next one be: {error}");
                Ok(Self { held: None })
            }
        }
    }

    /// Decides whether the basebackup is full; `data_directory` is that of the server where it is on this host.
    pub async fn prepare(
        &self,
        repository: &Repository,
        today: &Today,
        is_full_wanted: bool,
        data_directory: Option<&Path>,
    ) -> Result<Prepared, Error> {
        match &self.held {
            _ if is_full_wanted => Ok(Prepared::full(Reason::Asked)),
            None => Ok(Prepared::full(Reason::NoState)),
            Some((folder, _)) => prepare(repository, folder, today, data_directory).await,
        }
    }

    /// Announces the basebackup; where its parent has gone meanwhile, it is a full one.
    pub async fn begin(
        &self,
        repository: &Repository,
        options: BeginOptions,
        prepared: Prepared,
    ) -> Result<(BasebackupWriter, Begun), Error> {
        let at = repository.clock().now();
        let Prepared { mut decision, mut parent } = prepared;
        let with_parent = parent.as_ref().map(|parent| parent.basebackup().clone());
        let begun =
            BasebackupWriter::begin(repository, BeginOptions { parent: with_parent, ..options.clone() });
        let reason = match begun.await {
            Ok(writer) => return Ok((writer, self.begun(repository, decision, parent, at))),
            Err(repo::Error::Expired(id)) => Reason::ParentExpired(id),
            Err(repo::Error::Incomplete(id)) => Reason::ParentAbsent(id),
            Err(repo::Error::Abandoned(id)) => Reason::ParentAbandoned(id),
            Err(error) => return Err(error.into()),
        };
        (decision, parent) = (Decision::Full(reason), None);
        let writer = BasebackupWriter::begin(repository, BeginOptions { parent: None, ..options }).await?;
        Ok((writer, self.begun(repository, decision, parent, at)))
    }

    /// Starts to write the state of a basebackup; none where that fails, which is said.
    pub async fn writer(&self, id: BasebackupId) -> Option<StateWriter> {
        let (folder, lock) = self.held.as_ref()?;
        // A file is created and others are removed: as short as any other call of the state.
        folder
            .begin(lock, id)
            .map_err(|error| {
                tracing::warn!("nothing of this basebackup is remembered, the next one stores more than it would: {error}");
            })
            .ok()
    }

    /// Saves the state of a basebackup that was committed. A failure costs only what the next one could have spared.
    pub async fn save(
        self,
        writer: Option<StateWriter>,
        begun: &Begun,
        today: &Today,
        committed: &Committed,
        data_directory: PathBuf,
    ) {
        let (Some(writer), Some(hash_key)) = (writer, begun.hash_key.clone()) else {
            return;
        };
        let record = &committed.record;
        let since_read_all = match (&begun.decision, &begun.parent) {
            (Decision::Incremental(incremental), Some(parent)) => {
                incremental.since_read_all(parent.facts().since_read_all)
            }
            _ => 0,
        };
        let facts = StateFacts {
            site: today.site,
            basebackup: record.id,
            backup_json: committed.digest,
            cluster: record.cluster,
            timeline: record.timeline,
            start_lsn: record.start_lsn,
            stop_lsn: record.stop_lsn,
            started_at: begun.at,
            has_checksums: today.has_checksums,
            sealing: today.sealing,
            chunk_pages: today.chunk_pages,
            hash_key,
            since_read_all,
            data_directory,
        };
        if let Err(error) = blocking(move || Ok(writer.finish(&facts)?)).await {
            tracing::warn!(
                "this basebackup is not remembered, and the next one stores more than it would: {error}"
            );
        }
    }

    fn begun(
        &self,
        repository: &Repository,
        decision: Decision,
        parent: Option<Arc<KnownParent>>,
        at: Timestamp,
    ) -> Begun {
        tracing::info!("{decision}");
        // A fresh key at each full one; pages of an incremental one are compared with hashes of the old key.
        let draw = || self.held.as_ref().map(|_| HashKey::generate(repository.keyring().random()));
        let hash_key = parent.as_ref().map(|parent| parent.hash_key()).or_else(draw);
        Begun { decision, parent, hash_key, at }
    }
}

impl Today {
    /// Returns what is true of a cluster and of this release.
    pub fn of(
        repository: &Repository,
        cluster: repo::ClusterId,
        timeline: crate::pg::TimelineId,
        has_checksums: bool,
    ) -> Self {
        Self {
            site: repository.site(),
            cluster,
            timeline,
            has_checksums,
            sealing: repository.keyring().sealing(Audience::Basebackup),
            chunk_pages: CHUNK_PAGES as u32,
        }
    }
}
