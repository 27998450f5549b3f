//! An open basebackup: its entries by path, by directory and by number, read block by block.
//!
//! Opening costs three objects (`backup.json`, the beginning of `manifest`, `refs`) whatever the size of the
//! cluster; after that a block of the file table is fetched when something in it is asked for. File contents are
//! in `file_reader`.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use lru::LruCache;

use crate::codec::{Digest, FrameKey};
use crate::repo::documents::{BackupRecord, Begin, Outcome};
use crate::repo::entry::{Entry, TreePath};
use crate::repo::error::Error;
use crate::repo::file_table::decode_block;
use crate::repo::header::Header;
use crate::repo::id::{BasebackupId, PackId};
use crate::repo::identity::ObjectKind;
use crate::repo::keyring::Trust;
use crate::repo::manifest::ManifestStart;
use crate::repo::pack::pack_identity;
use crate::repo::refs::{REFS_BYTES_MAX, Refs};
use crate::repo::repository::Repository;
use crate::repo::sealed::SealedHead;
use crate::repo::signed::{DOCUMENT_BYTES_MAX, open_document};
use crate::storage;

/// A basebackup whose index is open.
#[derive(Debug)]
pub struct Basebackup {
    repository: Repository,
    record: BackupRecord,
    digest: Digest,
    trust: Trust,
    head: SealedHead,
    start: ManifestStart,
    refs: Refs,
    blocks: Mutex<BlockCache>,
    keys: Mutex<HashMap<PackId, Arc<FrameKey>>>,
}

/// Blocks of the file table: what was fetched, opened, and of a few of them the entries, which take five times as much.
#[derive(Debug)]
struct BlockCache {
    fetched: LruCache<usize, Bytes>,
    entries: LruCache<usize, Arc<Vec<Entry>>>,
}

/// A block has 64 KiB, so that 512 of them are 32 MiB and stand for half a million files. A starting server lists every
/// directory several times: where not all blocks of a basebackup find room, each time fetches all of them again.
const BLOCKS_CACHED_MAX: NonZeroUsize = NonZeroUsize::new(512).expect("512 is not zero");
/// A thousand entries of some hundred bytes each: 32 blocks stay below 12 MiB, and are what a look-up comes back to.
const BLOCKS_OF_ENTRIES_MAX: NonZeroUsize = NonZeroUsize::new(32).expect("32 is not zero");
/// Whoever goes through all blocks fetches so many of them ahead.
pub const BLOCKS_AHEAD: usize = 64;
/// Blocks that lie side by side are fetched by one request up to this size.
const BLOCK_RUN_BYTES_MAX: u64 = 4 << 20;
/// A manifest up to this size is fetched whole at once.
const WHOLE_MANIFEST_BYTES_MAX: u64 = 512 << 10;
/// Sixteen million file-table blocks.
const MANIFEST_START_BYTES_MAX: u64 = 128 << 20;

/// Reads `backup.json` of `id`: what became of the attempt, and the digest of the document.
///
/// # Errors
/// `Incomplete` where there is none yet.
pub async fn read_outcome(
    repository: &Repository,
    id: BasebackupId,
) -> Result<(Outcome, Digest, Trust), Error> {
    let key = repository.layout().outcome(id);
    let bytes = match repository.store().get(&key, DOCUMENT_BYTES_MAX).await {
        Err(error) if error.is_absent() => return Err(Error::Incomplete(id)),
        other => other?,
    };
    let identity = repository.basebackup_identity(ObjectKind::Outcome, id);
    let object = format!("backup.json of basebackup {id}");
    let (outcome, trust) = open_document(repository.keyring(), &identity, &bytes, &object)?;
    Ok((outcome, Digest::of(&bytes), trust))
}

/// Reads `begin` of `id`.
///
/// # Errors
/// An absent one is an absent object of the store ([`Error::is_absent`]).
pub async fn read_begin(repository: &Repository, id: BasebackupId) -> Result<Begin, Error> {
    let bytes = repository.store().get(&repository.layout().begin(id), DOCUMENT_BYTES_MAX).await?;
    let identity = repository.basebackup_identity(ObjectKind::Begin, id);
    Ok(open_document(repository.keyring(), &identity, &bytes, &format!("begin of basebackup {id}"))?.0)
}

impl Basebackup {
    /// Opens a complete basebackup that retention has not marked.
    pub async fn open(repository: &Repository, id: BasebackupId) -> Result<Self, Error> {
        let (expired, outcome) = futures::join!(repository.is_expired(id), read_outcome(repository, id));
        if expired? {
            return Err(Error::Expired(id));
        }
        let (record, digest, trust) = match outcome? {
            (Outcome::Complete(record), digest, trust) => (*record, digest, trust),
            (Outcome::Abandoned { id }, ..) => return Err(Error::Abandoned(id)),
        };
        let (manifest, refs) =
            futures::try_join!(read_manifest(repository, &record), read_refs(repository, &record))?;
        let (head, start, blocks) = manifest;
        let mut cache = BlockCache::new();
        for (n, block) in blocks {
            cache.fetched.put(n, block);
        }
        Ok(Self {
            repository: repository.clone(),
            record,
            digest,
            trust,
            head,
            start,
            refs,
            blocks: Mutex::new(cache),
            keys: Mutex::new(HashMap::new()),
        })
    }

    /// Returns its record.
    pub fn record(&self) -> &BackupRecord {
        &self.record
    }

    /// Returns BLAKE3 of its `backup.json`.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Returns whether a trusted signer vouches for it.
    pub fn trust(&self) -> Trust {
        self.trust
    }

    /// Returns the start frame of its manifest.
    pub fn start(&self) -> &ManifestStart {
        &self.start
    }

    /// Returns its packs.
    pub fn refs(&self) -> &Refs {
        &self.refs
    }

    /// Returns the repository it is in.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Returns the entry at `path` and its number.
    pub async fn entry(&self, path: &TreePath) -> Result<Option<(u64, Entry)>, Error> {
        let Some(n) = self.start.block_of(path) else {
            return Ok(None);
        };
        let block = self.block(n).await?;
        let found = block.binary_search_by(|entry| entry.path.split().cmp(&path.split()));
        Ok(found.ok().map(|at| (self.start.blocks[n].first_number + at as u64, block[at].clone())))
    }

    /// Returns the entry with this number, counted through the whole file table.
    pub async fn entry_by_number(&self, number: u64) -> Result<Option<Entry>, Error> {
        let Some(n) = self.start.block_of_number(number) else {
            return Ok(None);
        };
        let block = self.block(n).await?;
        Ok(block.get((number - self.start.blocks[n].first_number) as usize).cloned())
    }

    /// Returns the children of `dir` with their numbers, ascending by name.
    pub async fn children(&self, dir: &TreePath) -> Result<Vec<(u64, Entry)>, Error> {
        let mut children = Vec::new();
        let range = self.start.blocks_of_children(dir);
        self.load_blocks(range.clone()).await?;
        for n in range {
            let block = self.block(n).await?;
            let first = block.partition_point(|entry| entry.path.split().0 < dir.as_bytes());
            for (at, entry) in block.iter().enumerate().skip(first) {
                if entry.path.split().0 != dir.as_bytes() {
                    break;
                }
                children.push((self.start.blocks[n].first_number + at as u64, entry.clone()));
            }
        }
        Ok(children)
    }

    /// Shows every entry with its number, in order; blocks are fetched many at a time.
    pub async fn visit_entries<E: From<Error>>(
        &self,
        mut visit: impl FnMut(u64, &Entry) -> Result<(), E>,
    ) -> Result<(), E> {
        let count = self.block_count();
        for n in 0..count {
            if n.is_multiple_of(BLOCKS_AHEAD) {
                self.load_blocks(n..(n + BLOCKS_AHEAD).min(count)).await?;
            }
            let first = self.start.blocks[n].first_number;
            for (number, entry) in (first..).zip(&*self.block(n).await?) {
                visit(number, entry)?;
            }
        }
        Ok(())
    }

    /// Returns how many blocks the file table has.
    pub fn block_count(&self) -> usize {
        self.start.blocks.len()
    }

    /// Returns the entries of one block, in order.
    pub async fn block(&self, n: usize) -> Result<Arc<Vec<Entry>>, Error> {
        if let Some(entries) = self.lock_blocks().entries.get(&n) {
            return Ok(entries.clone());
        }
        let raw = match self.cached_block(n) {
            Some(raw) => raw,
            None => {
                let mut blocks = self.fetch_blocks(n..n + 1).await?;
                let returned = blocks.pop();
                returned
                    .ok_or_else(|| Error::Internal(format!("block {n} of the file table was not returned")))?
            }
        };
        let entries = Arc::new(self.decode_block(n, &raw)?);
        self.lock_blocks().entries.put(n, entries.clone());
        Ok(entries)
    }

    /// Fetches the file table from its beginning, as far as what is fetched stays: for whoever is about to list every directory.
    pub async fn load_file_table(&self) -> Result<(), Error> {
        self.load_blocks(0..self.block_count().min(BLOCKS_CACHED_MAX.get())).await
    }

    /// Fetches what is not cached of neighbouring blocks with few requests; no more than the cache holds.
    pub async fn load_blocks(&self, range: Range<usize>) -> Result<(), Error> {
        let mut from = range.start;
        while from < range.end {
            if self.cached_block(from).is_some() {
                from += 1;
                continue;
            }
            let run_len = |to: usize| self.head.range(from + 1..to + 1).map_or(u64::MAX, |r| r.end - r.start);
            let mut to = from + 1;
            while to < range.end
                && to - from < BLOCKS_CACHED_MAX.get() / 2
                && run_len(to + 1) <= BLOCK_RUN_BYTES_MAX
            {
                to += 1;
            }
            self.fetch_blocks(from..to).await?;
            from = to;
        }
        Ok(())
    }

    fn lock_blocks(&self) -> MutexGuard<'_, BlockCache> {
        self.blocks.lock().expect("no holder of this lock panics")
    }

    fn cached_block(&self, n: usize) -> Option<Bytes> {
        self.lock_blocks().fetched.get(&n).cloned()
    }

    fn manifest_name(&self) -> String {
        format!("the manifest of basebackup {}", self.record.id)
    }

    fn decode_block(&self, n: usize, raw: &[u8]) -> Result<Vec<Entry>, Error> {
        let damaged = |detail: String| Error::damaged(self.manifest_name(), detail);
        let entries = decode_block(raw).map_err(|error| damaged(format!("block {n} {error}")))?;
        if entries.len() as u32 != self.start.blocks[n].entries {
            return Err(damaged(format!("block {n} has another number of entries than it should")));
        }
        Ok(entries)
    }

    async fn fetch_blocks(&self, range: Range<usize>) -> Result<Vec<Bytes>, Error> {
        let object = self.manifest_name();
        let bytes_range = self
            .head
            .range(range.start + 1..range.end + 1)
            .ok_or_else(|| Error::damaged(&object, "it has fewer frames than its start frame names"))?;
        let key = self.repository.layout().manifest(self.record.id);
        let bytes = self.repository.store().get_range(&key, bytes_range.clone()).await;
        let bytes = bytes.map_err(|error| missing_is_damage(error, &object))?;
        let mut blocks = Vec::with_capacity(range.len());
        for n in range {
            let block = Bytes::from(self.head.open_frame(n + 1, bytes_range.start, &bytes)?);
            self.lock_blocks().fetched.put(n, block.clone());
            blocks.push(block);
        }
        Ok(blocks)
    }

    /// Returns bytes of `pack`, the range cut at its end.
    pub(crate) async fn pack_bytes(&self, pack: PackId, range: Range<u32>) -> Result<Bytes, Error> {
        let record = self.refs.find(pack).ok_or_else(|| Error::damaged(pack, "it is not among refs"))?;
        let key = self.repository.layout().pack(pack, &record.salt);
        let range = u64::from(range.start)..u64::from(range.end.min(record.size));
        let bytes = self.repository.store().get_range(&key, range).await;
        bytes.map_err(|error| missing_is_damage(error, &pack.to_string()))
    }

    /// Returns the key that opens the chunks of `pack`.
    pub(crate) fn pack_key(&self, pack: PackId) -> Result<Arc<FrameKey>, Error> {
        if let Some(key) = self.keys.lock().expect("no holder of this lock panics").get(&pack) {
            return Ok(key.clone());
        }
        let record = self.refs.find(pack).ok_or_else(|| {
            Error::damaged(format!("basebackup {}", self.record.id), format!("{pack} is not among its refs"))
        })?;
        let envelope = self
            .record
            .keys
            .get(record.key as usize)
            .ok_or_else(|| Error::damaged(pack, "its key is not in backup.json"))?;
        let key = self.repository.keyring().open_key(envelope, &pack.to_string())?;
        let identity = pack_identity(self.repository.site(), self.record.cluster, pack);
        let key = Arc::new(key.frame_key(&record.salt, &identity));
        self.keys.lock().expect("no holder of this lock panics").insert(pack, key.clone());
        Ok(key)
    }
}

impl BlockCache {
    fn new() -> Self {
        Self { fetched: LruCache::new(BLOCKS_CACHED_MAX), entries: LruCache::new(BLOCKS_OF_ENTRIES_MAX) }
    }
}

type Blocks = Vec<(usize, Bytes)>;

/// Reads what a manifest says beside its files: tablespaces, links, where the start-up set lies.
pub async fn read_manifest_start(
    repository: &Repository,
    record: &BackupRecord,
) -> Result<ManifestStart, Error> {
    let (_, start, _) = read_beginning(repository, record, record.manifest.start_size).await?;
    Ok(start)
}

/// Reads as much of the manifest as every reader needs; all of it where it is small.
async fn read_manifest(
    repository: &Repository,
    record: &BackupRecord,
) -> Result<(SealedHead, ManifestStart, Blocks), Error> {
    let pin = record.manifest;
    let wanted = if pin.size <= WHOLE_MANIFEST_BYTES_MAX { pin.size } else { pin.start_size };
    let (head, start, bytes) = read_beginning(repository, record, wanted).await?;
    let mut blocks = Vec::new();
    if wanted == pin.size {
        for n in 0..start.blocks.len().min(BLOCKS_CACHED_MAX.get()) {
            blocks.push((n, Bytes::from(head.open_frame(n + 1, 0, &bytes)?)));
        }
    }
    Ok((head, start, blocks))
}

/// Reads the first `wanted` bytes of the manifest, at least its head and its start frame.
async fn read_beginning(
    repository: &Repository,
    record: &BackupRecord,
    wanted: u64,
) -> Result<(SealedHead, ManifestStart, Bytes), Error> {
    let (id, pin) = (record.id, record.manifest);
    let object = format!("the manifest of basebackup {id}");
    let damaged = |detail: &str| Error::damaged(&object, detail);
    if wanted > MANIFEST_START_BYTES_MAX || pin.head_size > pin.start_size || pin.start_size > pin.size {
        return Err(damaged("backup.json names impossible sizes"));
    }
    let bytes = repository.store().get_range(&repository.layout().manifest(id), 0..wanted).await;
    let bytes = bytes.map_err(|error| missing_is_damage(error, &object))?;
    let head_bytes = bytes.get(..pin.head_size as usize).ok_or_else(|| damaged("it is cut"))?;
    if Digest::of(head_bytes) != pin.head_digest {
        return Err(damaged("its beginning is not the one backup.json names"));
    }
    let header = Header::parse(head_bytes, ObjectKind::Manifest, &object)?;
    let identity = repository.basebackup_identity(ObjectKind::Manifest, id);
    let head = SealedHead::open(head_bytes, &header, repository.keyring(), &identity, &object)?;
    let raw = head.open_frame(0, 0, &bytes)?;
    let start =
        ManifestStart::decode(&raw).map_err(|error| Error::damaged(&object, format!("its start {error}")))?;
    Ok((head, start, bytes))
}

/// Reads which packs a basebackup names, without any key.
pub async fn read_refs(repository: &Repository, record: &BackupRecord) -> Result<Refs, Error> {
    let object = format!("refs of basebackup {}", record.id);
    let bytes = repository.store().get(&repository.layout().refs(record.id), REFS_BYTES_MAX).await;
    let bytes = bytes.map_err(|error| missing_is_damage(error, &object))?;
    if bytes.len() as u64 != record.refs.size || Digest::of(&bytes) != record.refs.digest {
        return Err(Error::damaged(object, "it is not the one backup.json names"));
    }
    Refs::decode(&bytes, &object)
}

/// The commit says that the object is there: when the store says it is not, something took it away.
fn missing_is_damage(error: storage::Error, object: &str) -> Error {
    if error.is_absent() { Error::damaged(object, "it is missing from the store") } else { error.into() }
}
