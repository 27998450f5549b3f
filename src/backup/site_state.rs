//! The state of a site for one basebackup: locked, read before it, written beside it, saved behind it.
//!
//! The lock keeps two basebackups of one site on one host apart. A state folder that cannot be used is no reason to go
//! without a basebackup: it is said, and the basebackup is full. Nothing here decides; `known_parent` does.

use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;

use crate::backup::change::{Decision, Reason, Today};
use crate::backup::error::Error;
use crate::backup::gather::CHUNK_PAGES;
use crate::backup::known_parent::{KnownParent, Look, Prepared, prepare, take_up};
use crate::backup::run::blocking;
use crate::backup::state::{BackupLock, HashKey, Journal, StateError, StateFacts, StateFolder, StateWriter};
use crate::codec::Digest;
use crate::pg::{Lsn, TimelineId};
use crate::repo::{
    self, BasebackupId, BasebackupWriter, BeginOptions, Committed, Repository, keyring::Audience,
};

/// The state of a site, held for one basebackup.
#[derive(Debug)]
pub struct SiteState {
    /// Or why basebackups are not remembered.
    held: Result<(StateFolder, Arc<BackupLock>), String>,
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
    /// Takes the lock in the folder of a site below `states`, which may be why there is none: nothing is remembered then.
    ///
    /// # Errors
    /// Where another process takes a basebackup of the site.
    pub async fn take(repository: &Repository, states: Result<&Path, &String>) -> Result<Self, Error> {
        let states = match states {
            Ok(states) => states,
            Err(why) => return Ok(Self { held: Err(why.clone()) }),
        };
        let folder = StateFolder::new(states.join(repository.site().to_string()));
        let locking = folder.clone();
        match blocking(move || Ok(locking.take_lock())).await? {
            Ok(lock) => Ok(Self { held: Ok((folder, Arc::new(lock))) }),
            Err(error @ StateError::Busy { .. }) => Err(error.into()),
            Err(error) => {
                tracing::warn!("the basebackup is full, and so will the next one be: {error}");
                Ok(Self { held: Err(error.to_string()) })
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
        self.decide(repository, today, (is_full_wanted, Look::ToTake), data_directory).await
    }

    /// Says what [`Self::prepare`] would decide, and writes nothing.
    pub async fn foresee(
        &self,
        repository: &Repository,
        today: &Today,
        is_full_wanted: bool,
        data_directory: Option<&Path>,
    ) -> Result<Prepared, Error> {
        self.decide(repository, today, (is_full_wanted, Look::Only), data_directory).await
    }

    async fn decide(
        &self,
        repository: &Repository,
        today: &Today,
        (is_full_wanted, look): (bool, Look),
        data_directory: Option<&Path>,
    ) -> Result<Prepared, Error> {
        let (folder, lock) = match &self.held {
            _ if is_full_wanted => return Ok(Prepared::full(Reason::Asked)),
            Ok((folder, lock)) => (folder, lock),
            Err(why) => return Ok(Prepared::full(Reason::StateUnusable(why.clone()))),
        };
        match take_up(repository, (folder, lock), today, look).await? {
            Some(prepared) => Ok(prepared),
            None => prepare(repository, folder, today, data_directory).await,
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

    /// Starts what is written beside a basebackup: its state, and the journal of a full one.
    pub async fn remembered(
        &self,
        id: BasebackupId,
        begun: &Begun,
        today: &Today,
    ) -> (Option<StateWriter>, Option<Journal>) {
        let state = self.writer(id).await;
        let journal = state.as_ref().and_then(|_| self.journal(id, begun, today));
        (state, journal)
    }

    /// Starts to write the state of a basebackup; none where that fails, which is said.
    pub async fn writer(&self, id: BasebackupId) -> Option<StateWriter> {
        let (folder, lock) = self.held.as_ref().ok()?;
        // A file is created and others are removed: as short as any other call of the state.
        folder
            .begin(lock, id)
            .map_err(|error| {
                tracing::warn!("nothing of this basebackup is remembered, the next one stores more than it would: {error}");
            })
            .ok()
    }

    /// Starts the journal of a full basebackup, which says what a kill leaves; none for others, or where that fails.
    pub fn journal(&self, id: BasebackupId, begun: &Begun, today: &Today) -> Option<Journal> {
        let ((folder, lock), hash_key) = (self.held.as_ref().ok()?, begun.hash_key.clone()?);
        if begun.parent.is_some() {
            return None;
        }
        let facts = StateFacts {
            site: today.site,
            basebackup: id,
            // What only its end knows: nobody builds upon it without having read every page.
            backup_json: Digest([0; 32]),
            start_lsn: Lsn::ZERO,
            stop_lsn: Lsn::ZERO,
            cluster: today.cluster,
            timeline: today.timeline,
            started_at: begun.at,
            has_checksums: today.has_checksums,
            sealing: today.sealing,
            chunk_pages: today.chunk_pages,
            hash_key,
            since_read_all: 0,
        };
        let begun = folder.begin_journal(lock, &facts).inspect_err(|error| {
            tracing::warn!("if this basebackup is killed, the next one begins anew: {error}");
        });
        begun.ok()
    }

    /// Saves the state of a basebackup that was committed. A failure costs only what the next one could have spared.
    pub async fn save(
        self,
        writer: Option<StateWriter>,
        begun: &Begun,
        today: &Today,
        committed: &Committed,
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
        let draw = || self.held.as_ref().ok().map(|_| HashKey::generate(repository.keyring().random()));
        let hash_key = parent.as_ref().map(|parent| parent.hash_key()).or_else(draw);
        Begun { decision, parent, hash_key, at }
    }
}

impl Today {
    /// Returns what is true of a cluster and of this release.
    pub fn of(
        repository: &Repository,
        cluster: repo::ClusterId,
        timeline: TimelineId,
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
