//! Writing a basebackup: intent, fence, packs, manifest, outcome — in an order that no crash can make a lie of.
//!
//! `begin` is created; the parent is read: not expired, complete; packs; those of others that are named are looked
//! for; `manifest` and `refs`; last of all `backup.json`.
//!
//! Before the last everything is garbage, after it a whole basebackup. The order was
//! model-checked with stalling writers and two sweepers; dropping any one step breaks it (3-format).
//! Reading and compressing is not here: the writer takes compressed chunks in the order they are to stand in.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};

use crate::codec::{Compression, Digest};
use crate::pg::{Lsn, TimelineId};
use crate::repo::documents::{BackupRecord, Begin, ManifestPin, ObjectPin, Outcome};
use crate::repo::error::Error;
use crate::repo::id::{BasebackupId, ClusterId, PackId};
use crate::repo::identity::ObjectKind;
use crate::repo::keyring::{Audience, ContentKey, KeyEnvelope};
use crate::repo::manifest::ManifestContent;
use crate::repo::named_chunks::NamedChunks;
use crate::repo::pack::{Pack, PackBuilder, pack_identity};
use crate::repo::pack_presence::missing_packs;
use crate::repo::refs::{PackRecord, Refs};
use crate::repo::repository::Repository;
use crate::repo::sealed::{SealSpec, seal};
use crate::repo::signed::{DOCUMENT_BYTES_MAX, open_document, seal_document};
use crate::storage;

/// What an attempt is about, known before anything is read.
#[derive(Debug, Clone)]
pub struct BeginOptions {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its timeline.
    pub timeline: TimelineId,
    /// Redo location now.
    pub wal_floor: Lsn,
    /// The basebackup whose chunks may be named.
    pub parent: Option<Arc<ParentBasebackup>>,
    /// Host and process, for people.
    pub host: String,
    /// The process.
    pub pid: u32,
}

/// What a writer has to know of the basebackup whose chunks it names.
#[derive(Debug)]
pub struct ParentBasebackup {
    /// Its record.
    pub record: BackupRecord,
    /// BLAKE3 of its `backup.json`.
    pub digest: Digest,
    /// Its packs, the only ones that may be named.
    pub refs: Refs,
}

/// How far ahead of this host's clock another host's is believed to be.
const CLOCK_SKEW_MAX: SignedDuration = SignedDuration::from_hours(24);

/// An attempt at a basebackup.
#[derive(Debug)]
pub struct BasebackupWriter {
    repository: Repository,
    begin: Begin,
    key: ContentKey,
    parent: Option<Arc<ParentBasebackup>>,
    next_pack: Mutex<u32>,
    uploaded: Mutex<Vec<PackRecord>>,
}

/// The deciding facts of a basebackup that only its end knows; the writer fills in the rest of the record.
#[derive(Debug)]
pub struct Completion {
    /// A record whose keys, pins and sizes are still empty.
    pub record: BackupRecord,
    /// Everything the manifest says.
    pub content: ManifestContent,
    /// The chunks that map blocks in map chunks name; what entries name themselves is added here.
    pub named: NamedChunks,
    /// How manifest frames are compressed.
    pub compression: Compression,
}

/// A basebackup that was committed a moment ago.
#[derive(Debug)]
pub struct Committed {
    /// Its record.
    pub record: BackupRecord,
    /// BLAKE3 of its `backup.json`.
    pub digest: Digest,
    /// Bytes of all packs it names, whether they are in use or not.
    pub packs_bytes: u64,
}

impl BasebackupWriter {
    /// Announces an attempt and checks that its parent may be built upon.
    ///
    /// # Errors
    /// `Expired` or `Incomplete` for the parent: the caller starts again without it.
    pub async fn begin(repository: &Repository, options: BeginOptions) -> Result<Self, Error> {
        let keyring = repository.keyring();
        let (key, envelope) = keyring.create_key(Audience::Basebackup)?;
        let parent_id = options.parent.as_ref().map(|parent| parent.record.id);
        let before = newest_before(repository).await?.max(parent_id);
        let mut begin = Begin {
            id: BasebackupId::new(repository.clock().now(), before, keyring.random()),
            parent: parent_id,
            cluster: options.cluster,
            timeline: options.timeline,
            wal_floor: options.wal_floor,
            key: envelope,
            host: options.host,
            pid: options.pid,
        };
        loop {
            let identity = repository.basebackup_identity(ObjectKind::Begin, begin.id);
            let bytes = seal_document(keyring, &identity, &begin)?;
            match repository.store().create(&repository.layout().begin(begin.id), bytes).await {
                Ok(()) => break,
                // Another attempt drew the same four digits in the same second.
                Err(error) if error.kind() == storage::ErrorKind::AlreadyExists => {
                    begin.id = BasebackupId::new(repository.clock().now(), before, keyring.random());
                }
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(parent) = parent_id {
            fence(repository, parent).await?;
        }
        Ok(Self {
            repository: repository.clone(),
            begin,
            key,
            parent: options.parent,
            next_pack: Mutex::new(0),
            uploaded: Mutex::new(Vec::new()),
        })
    }

    /// Returns the id of the attempt.
    pub fn id(&self) -> BasebackupId {
        self.begin.id
    }

    /// Starts the next pack.
    pub fn create_pack(&self) -> PackBuilder {
        let mut next = self.next_pack.lock().expect("no holder of this lock panics");
        let id = PackId { origin: self.begin.id, number: *next };
        *next += 1;
        let mut salt = [0; 32];
        self.repository.keyring().random().fill(&mut salt);
        let identity = pack_identity(self.repository.site(), self.begin.cluster, id);
        PackBuilder::new(&identity, id, salt, &self.key, &self.begin.key)
    }

    /// Stores a pack; returns when it is durable.
    pub async fn upload(&self, pack: Pack) -> Result<(), Error> {
        let key = self.repository.layout().pack(pack.id, &pack.salt);
        let record = PackRecord {
            id: pack.id,
            size: pack.bytes.len() as u32,
            live: 0,
            key: 0,
            salt: pack.salt,
            digest: pack.digest,
        };
        self.repository.store().create(&key, pack.bytes).await?;
        self.uploaded.lock().expect("no holder of this lock panics").push(record);
        Ok(())
    }

    /// Stores manifest and refs and commits the basebackup.
    ///
    /// # Errors
    /// `Abandoned` where a sweeper gave the attempt up in the meantime, `PacksMissing` where something named is not in
    /// the store as it was written; nothing of the attempt counts then.
    pub async fn finish(self, completion: Completion) -> Result<BackupRecord, Error> {
        Ok(self.finish_pinned(completion).await?.record)
    }

    /// Does what [`BasebackupWriter::finish`] does, and tells by what the basebackup is recognised later.
    pub async fn finish_pinned(self, completion: Completion) -> Result<Committed, Error> {
        let Completion { mut record, content, mut named, compression } = completion;
        content.entries.iter().for_each(|entry| named.name_content(&entry.node));
        let (refs, keys) = self.collect_refs(&named)?;
        self.check_reused(&refs).await?;
        let frames = content.into_frames(compression)?;
        let start_frame_len =
            frames.first().map_or(0, |frame| frame.body.len() + crate::codec::TAG_LEN) as u64;
        let identity = self.repository.basebackup_identity(ObjectKind::Manifest, self.begin.id);
        let spec = SealSpec {
            keyring: self.repository.keyring(),
            identity: &identity,
            key: &self.key,
            envelope: &self.begin.key,
        };
        let manifest = seal(&spec, frames)?;
        let refs_bytes = Bytes::from(refs.encode());
        let head_size = manifest.head_len;
        record.id = self.begin.id;
        record.parent = self.begin.parent;
        record.parent_digest = self.parent.as_ref().map(|parent| parent.digest);
        record.keys = keys;
        record.manifest = ManifestPin {
            size: manifest.bytes.len() as u64,
            digest: Digest::of(&manifest.bytes),
            head_size,
            head_digest: Digest::of(&manifest.bytes[..head_size as usize]),
            start_size: head_size + start_frame_len,
        };
        record.refs = ObjectPin { size: refs_bytes.len() as u64, digest: Digest::of(&refs_bytes) };
        let own: u64 =
            refs.records().iter().filter(|r| r.id.origin == self.begin.id).map(|r| u64::from(r.size)).sum();
        record.size.stored_bytes = own + record.manifest.size + record.refs.size;
        record.size.live_bytes = refs.records().iter().map(|record| u64::from(record.live)).sum();
        let (store, layout) = (self.repository.store(), self.repository.layout());
        store.create(&layout.manifest(self.begin.id), manifest.bytes).await?;
        store.create(&layout.refs(self.begin.id), refs_bytes).await?;
        let packs_bytes = refs.records().iter().map(|record| u64::from(record.size)).sum();
        let (record, digest) = self.commit(record).await?;
        Ok(Committed { record, digest, packs_bytes })
    }

    /// Looks for the packs of others that are named.
    async fn check_reused(&self, refs: &Refs) -> Result<(), Error> {
        let reused = refs.records().iter().filter(|record| record.id.origin != self.begin.id);
        let missing = missing_packs(&self.repository, reused).await?;
        if missing.is_empty() { Ok(()) } else { Err(Error::PacksMissing(missing)) }
    }

    async fn commit(self, record: BackupRecord) -> Result<(BackupRecord, Digest), Error> {
        let (store, id) = (self.repository.store(), self.begin.id);
        let identity = self.repository.basebackup_identity(ObjectKind::Outcome, id);
        let outcome = Outcome::Complete(Box::new(record));
        let bytes = seal_document(self.repository.keyring(), &identity, &outcome)?;
        let key = self.repository.layout().outcome(id);
        match store.create(&key, bytes.clone()).await {
            Ok(()) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    storage::ErrorKind::AlreadyExists | storage::ErrorKind::OutcomeUnknown
                ) =>
            {
                if store.get(&key, DOCUMENT_BYTES_MAX).await? != bytes {
                    return Err(Error::Abandoned(id));
                }
            }
            Err(error) => return Err(error.into()),
        }
        let Outcome::Complete(record) = outcome else { unreachable!("constructed as complete above") };
        Ok((*record, Digest::of(&bytes)))
    }

    /// Lists every pack that the content names, with live bytes, and the keys they need, our own first.
    fn collect_refs(&self, named: &NamedChunks) -> Result<(Refs, Vec<KeyEnvelope>), Error> {
        let mut keys = vec![self.begin.key.clone()];
        let mut records = self.uploaded.lock().expect("no holder of this lock panics").clone();
        if let Some(parent) = &self.parent {
            for reused in parent.refs.records().iter().filter(|record| named.live_bytes(record.id) > 0) {
                let key = parent.record.keys.get(reused.key as usize).ok_or_else(|| {
                    Error::damaged(
                        format!("basebackup {}", parent.record.id),
                        "a pack names a key it does not have",
                    )
                })?;
                let at = keys.iter().position(|known| known == key).unwrap_or_else(|| {
                    keys.push(key.clone());
                    keys.len() - 1
                });
                records.push(PackRecord { key: at as u32, ..*reused });
            }
        }
        for record in &mut records {
            record.live = named.live_bytes(record.id);
        }
        let refs = Refs::new(records);
        match named.packs().find(|pack| refs.find(*pack).is_none()) {
            Some(missing) => Err(Error::Internal(format!("{missing} is named and was never stored"))),
            None => Ok((refs, keys)),
        }
    }
}

/// Returns the newest attempt there is, so that the next sorts after it though this host's clock may be behind the
/// last one's: `latest` is the last by id.
///
/// One that seems to come from a day ahead or more is left out: a clock that was once wrong must not date
/// everything after it.
async fn newest_before(repository: &Repository) -> Result<Option<BasebackupId>, Error> {
    let layout = repository.layout();
    let prefix = layout.basebackups();
    let folder = repository.store().list_folder(&prefix).await?;
    let bound = repository.clock().now().saturating_add(CLOCK_SKEW_MAX).unwrap_or(Timestamp::MAX);
    let ids =
        folder.folders.iter().filter_map(|name| layout.parse_basebackup_folder(&format!("{prefix}{name}")));
    Ok(ids.filter(|id| id.time() < bound).max())
}

/// Reads the parent after `begin` exists, so that no sweeper can take it unseen.
async fn fence(repository: &Repository, parent: BasebackupId) -> Result<(), Error> {
    if repository.is_expired(parent).await? {
        return Err(Error::Expired(parent));
    }
    let key = repository.layout().outcome(parent);
    let bytes = match repository.store().get(&key, DOCUMENT_BYTES_MAX).await {
        Err(error) if error.is_absent() => return Err(Error::Incomplete(parent)),
        other => other?,
    };
    let identity = repository.basebackup_identity(ObjectKind::Outcome, parent);
    match open_document(repository.keyring(), &identity, &bytes, key.as_str())?.0 {
        Outcome::Complete(_) => Ok(()),
        Outcome::Abandoned { id } => Err(Error::Abandoned(id)),
    }
}
