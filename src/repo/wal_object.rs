//! WAL in the archive: one object a segment, sealed in frames, with a signed header that says what is inside.
//!
//! Raw size and a salted digest of the raw content stand in the header, so that a host without the private key can
//! tell "the same again" from "something different under this name" by reading a few hundred bytes. An object is
//! created once; whatever the answer to a put, what stands there afterwards is read and compared.
//! Segments above 64 MiB will be stored in parts (3-format); they are refused here until then.

use bytes::Bytes;

use crate::codec::{Compression, Digest};
use crate::pg::{Lsn, TimelineId};
use crate::repo::error::Error;
use crate::repo::header::{Header, Section};
use crate::repo::id::ClusterId;
use crate::repo::identity::{Identity, ObjectKind};
use crate::repo::keyring::{ContentKey, KeyEnvelope, Keyring};
use crate::repo::layout::WalObjectName;
use crate::repo::repository::Repository;
use crate::repo::sealed::{SealSpec, compress_frames, open_all, seal_signed};
use crate::repo::wire::{WireError, WireWriter};
use crate::storage::{self, ErrorKind, ObjectKey};

pub use crate::repo::archive_head::{ArchiveHead, archive_head, newest_head};
pub use crate::repo::wal_piece::{archive_piece, read_pieces};

/// What became of a file that was to be archived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Archived {
    /// It is in the archive now.
    Created,
    /// It had been there before, byte for byte.
    Identical,
}

/// A file of the archive, sealed and not stored yet: sealing wants a processor, storing waits for the store.
#[derive(Debug)]
pub struct SealedFile {
    target: Target,
    bytes: Bytes,
}

/// The place of a file in the archive, where something stands already, or may stand.
#[derive(Debug)]
pub struct TakenPlace {
    target: Target,
    /// Why it is not known whether anything stands there.
    doubt: Option<storage::Error>,
}

/// What became of a sealed file.
#[derive(Debug)]
pub enum Stored {
    /// It is in the archive now.
    Created,
    /// Something stands in its place, which may be the same.
    Taken(TakenPlace),
}

/// A key for WAL and how it travels; one serves many segments.
#[derive(Debug, Clone)]
pub struct WalKey {
    key: ContentKey,
    envelope: KeyEnvelope,
}

/// What the signed header of a WAL or history object says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalHeader {
    /// Bytes of the file.
    pub raw_size: u64,
    /// BLAKE3 of the file, salted with the object's salt.
    pub content_digest: Digest,
    /// BLAKE3 of index and frames as stored.
    pub body_digest: Digest,
    salt: [u8; 32],
}

/// The timeline a history file's timeline branched off from, and where; plain in the signed header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryBranch {
    /// The parent timeline.
    pub parent: TimelineId,
    /// Where the new timeline begins.
    pub switch: Lsn,
}

/// Frames of a WAL object: larger than a page-map chunk because WAL is read in order.
const FRAME_BYTES: usize = 128 << 10;
/// The largest file that is one object.
pub const WAL_RAW_BYTES_MAX: u64 = 64 << 20;
/// A segment that does not compress, its index and its header.
const WAL_OBJECT_BYTES_MAX: u64 = WAL_RAW_BYTES_MAX + (2 << 20);
/// Enough of an object for its header with a handful of recipients.
const HEADER_BYTES_GUESS: u64 = 16 << 10;

impl WalKey {
    /// Draws a key for what this process will archive.
    pub fn create(keyring: &Keyring) -> Result<Self, Error> {
        let (key, envelope) = keyring.create_key(crate::repo::keyring::Audience::Wal)?;
        Ok(Self { key, envelope })
    }
}

/// Archives a segment, a partial segment or a backup history file.
///
/// # Errors
/// `Different` where another file stands under the name.
pub async fn archive_wal(
    repository: &Repository,
    cluster: ClusterId,
    name: WalObjectName,
    raw: &[u8],
    key: &WalKey,
    compression: Compression,
) -> Result<Archived, Error> {
    archive(repository, seal_wal(repository, cluster, name, raw, key, compression)?, raw).await
}

/// Archives a timeline history file.
pub async fn archive_history(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
    branch: HistoryBranch,
    raw: &[u8],
    key: &WalKey,
) -> Result<Archived, Error> {
    archive(repository, seal_history(repository, cluster, timeline, branch, raw, key)?, raw).await
}

/// Compresses and seals a segment, a partial segment or a backup history file.
pub fn seal_wal(
    repository: &Repository,
    cluster: ClusterId,
    name: WalObjectName,
    raw: &[u8],
    key: &WalKey,
    compression: Compression,
) -> Result<SealedFile, Error> {
    seal_file(repository.keyring(), wal_target(repository, cluster, name), raw, key, compression, None)
}

/// Compresses and seals a timeline history file.
pub fn seal_history(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
    branch: HistoryBranch,
    raw: &[u8],
    key: &WalKey,
) -> Result<SealedFile, Error> {
    let target = history_target(repository, cluster, timeline);
    seal_file(repository.keyring(), target, raw, key, Compression::zstd(1), Some(branch))
}

impl SealedFile {
    /// Returns how many bytes are to be stored.
    pub fn stored_len(&self) -> usize {
        self.bytes.len()
    }

    /// Creates the object; returns when the store has it durably, or has something else in its place.
    pub async fn store(self, repository: &Repository) -> Result<Stored, Error> {
        let Self { target, bytes } = self;
        match repository.store().create(&target.key, bytes).await {
            Ok(()) => Ok(Stored::Created),
            Err(error) => match error.kind() {
                ErrorKind::AlreadyExists => Ok(Stored::Taken(TakenPlace { target, doubt: None })),
                ErrorKind::OutcomeUnknown => Ok(Stored::Taken(TakenPlace { target, doubt: Some(error) })),
                _ => Err(error.into()),
            },
        }
    }
}

impl TakenPlace {
    /// Decides whether what stands in the archive is what was to be archived: all of it, because the server removes its
    /// segment once it is told so, and a header vouches for no body.
    ///
    /// # Errors
    /// `Different` where it is another file; where nothing stands there after all, why nothing could be put there.
    pub async fn compare(self, repository: &Repository, raw: &[u8]) -> Result<Archived, Error> {
        let Self { target, doubt } = self;
        let bytes = match (repository.store().get(&target.key, WAL_OBJECT_BYTES_MAX).await, doubt) {
            (Ok(bytes), _) => bytes,
            (Err(error), Some(doubt)) if error.is_absent() => return Err(doubt.into()),
            (Err(error), _) => return Err(error.into()),
        };
        let header = read_verified(repository, &target, &bytes)?.1;
        let same =
            header.raw_size == raw.len() as u64 && header.content_digest == Digest::salted(&header.salt, raw);
        if same { Ok(Archived::Identical) } else { Err(Error::Different { object: target.object }) }
    }
}

/// Reads a file of the archive back, every byte verified.
pub async fn read_wal(
    repository: &Repository,
    cluster: ClusterId,
    name: WalObjectName,
) -> Result<Bytes, Error> {
    read(repository, &wal_target(repository, cluster, name)).await
}

/// Reads a timeline history file back.
pub async fn read_history(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
) -> Result<Bytes, Error> {
    read(repository, &history_target(repository, cluster, timeline)).await
}

/// Reads what the header of an archived file says, without any private key.
pub async fn read_wal_header(
    repository: &Repository,
    cluster: ClusterId,
    name: WalObjectName,
) -> Result<WalHeader, Error> {
    let target = wal_target(repository, cluster, name);
    let bytes = read_front(repository, &target).await?;
    Ok(parse_verified(repository, &target, &bytes)?.1)
}

/// Verifies an archived file as it is stored, all of it, without any private key.
pub async fn verify_wal(
    repository: &Repository,
    cluster: ClusterId,
    name: WalObjectName,
) -> Result<WalHeader, Error> {
    let target = wal_target(repository, cluster, name);
    let bytes = repository.store().get(&target.key, WAL_OBJECT_BYTES_MAX).await?;
    Ok(read_verified(repository, &target, &bytes)?.1)
}

/// Reads where a timeline branched off, without any private key.
pub async fn read_history_branch(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
) -> Result<HistoryBranch, Error> {
    let target = history_target(repository, cluster, timeline);
    let bytes = read_front(repository, &target).await?;
    let (header, _) = parse_verified(repository, &target, &bytes)?;
    let damaged = |error: WireError| Error::damaged(&target.object, format!("its header {error}"));
    let mut section = header.section(Section::History, &target.object)?;
    let parent = section.u32().map_err(damaged)?;
    let switch = Lsn(section.u64().map_err(damaged)?);
    let parent =
        TimelineId::new(parent).ok_or_else(|| Error::damaged(&target.object, "its parent is timeline 0"))?;
    Ok(HistoryBranch { parent, switch })
}

/// An object of the archive: its key, its identity, and what it is called in messages.
#[derive(Debug, Clone)]
struct Target {
    key: ObjectKey,
    identity: Identity,
    object: String,
}

fn wal_target(repository: &Repository, cluster: ClusterId, name: WalObjectName) -> Target {
    let key = repository.layout().wal_object(cluster, name);
    let leaf = key.as_str().rsplit('/').next().unwrap_or_default().to_owned();
    let timeline = Some(name.segment().timeline());
    let object = format!("WAL file {leaf}");
    let identity = Identity { name: leaf, ..repository.identity(ObjectKind::Wal, cluster, timeline) };
    Target { key, identity, object }
}

fn history_target(repository: &Repository, cluster: ClusterId, timeline: TimelineId) -> Target {
    let name = format!("{}.history", timeline.hex8());
    let object = format!("timeline history file {name}");
    let identity = Identity { name, ..repository.identity(ObjectKind::History, cluster, Some(timeline)) };
    Target { key: repository.layout().history(cluster, timeline), identity, object }
}

async fn archive(repository: &Repository, sealed: SealedFile, raw: &[u8]) -> Result<Archived, Error> {
    match sealed.store(repository).await? {
        Stored::Created => Ok(Archived::Created),
        Stored::Taken(place) => place.compare(repository, raw).await,
    }
}

fn seal_file(
    keyring: &Keyring,
    target: Target,
    raw: &[u8],
    key: &WalKey,
    compression: Compression,
    branch: Option<HistoryBranch>,
) -> Result<SealedFile, Error> {
    if raw.len() as u64 > WAL_RAW_BYTES_MAX {
        let (what, size) = (target.object, raw.len() as u64);
        return Err(Error::TooLarge { what, size, max: WAL_RAW_BYTES_MAX });
    }
    let frames = compress_frames(compression, FRAME_BYTES, raw)?;
    let spec = SealSpec { keyring, identity: &target.identity, key: &key.key, envelope: &key.envelope };
    let sealed = seal_signed(&spec, frames, |salt, body_digest| {
        let mut content = WireWriter::new();
        content.u64(raw.len() as u64).raw(Digest::salted(salt, raw).as_bytes()).raw(body_digest.as_bytes());
        let mut sections = vec![(Section::Wal, content)];
        if let Some(branch) = branch {
            let mut history = WireWriter::new();
            history.u32(branch.parent.get()).u64(branch.switch.0);
            sections.push((Section::History, history));
        }
        sections
    });
    Ok(SealedFile { target, bytes: sealed.bytes })
}

async fn read_front(repository: &Repository, target: &Target) -> Result<Bytes, Error> {
    let store = repository.store();
    let size = store.head(&target.key).await?.size;
    if size == 0 {
        return Err(Error::damaged(&target.object, "it is empty"));
    }
    let front = store.get_range(&target.key, 0..size.min(HEADER_BYTES_GUESS)).await?;
    let header_len = Header::len_of(&front, &target.object)? as u64;
    if header_len <= front.len() as u64 || header_len > size {
        return Ok(front);
    }
    Ok(store.get_range(&target.key, 0..header_len).await?)
}

fn parse_verified(
    repository: &Repository,
    target: &Target,
    bytes: &[u8],
) -> Result<(Header, WalHeader), Error> {
    let object = &target.object;
    let header = Header::parse(bytes, target.identity.kind, object)?;
    header.verify(bytes, repository.keyring(), &target.identity, object)?;
    let damaged = |error: WireError| Error::damaged(object, format!("its header {error}"));
    let salt = header.section(Section::Salt, object)?.array().map_err(damaged)?;
    let mut section = header.section(Section::Wal, object)?;
    let raw_size = section.u64().map_err(damaged)?;
    let content_digest = Digest(section.array().map_err(damaged)?);
    let body_digest = Digest(section.array().map_err(damaged)?);
    Ok((header, WalHeader { raw_size, content_digest, body_digest, salt }))
}

/// Verifies a whole object as stored, which takes no private key.
fn read_verified(
    repository: &Repository,
    target: &Target,
    bytes: &[u8],
) -> Result<(Header, WalHeader), Error> {
    let (header, wal) = parse_verified(repository, target, bytes)?;
    if Digest::of(&bytes[header.len..]) != wal.body_digest {
        return Err(Error::damaged(&target.object, "its body is not the one its header names"));
    }
    Ok((header, wal))
}

async fn read(repository: &Repository, target: &Target) -> Result<Bytes, Error> {
    let bytes = repository.store().get(&target.key, WAL_OBJECT_BYTES_MAX).await?;
    let (here, target) = (repository.clone(), target.clone());
    repository.compute(move || open(&here, &target, &bytes)).await
}

/// Opens a whole object: nothing is decrypted or inflated but what the header's signer wrote.
fn open(repository: &Repository, target: &Target, bytes: &[u8]) -> Result<Bytes, Error> {
    let (header, wal) = read_verified(repository, target, bytes)?;
    let damaged = |detail: &str| Error::damaged(&target.object, detail);
    if wal.raw_size > WAL_RAW_BYTES_MAX {
        return Err(damaged("its header names an impossible size"));
    }
    let raw = open_all(bytes, &header, repository.keyring(), &target.identity, &target.object, wal.raw_size)?;
    if Digest::salted(&wal.salt, &raw) != wal.content_digest {
        return Err(damaged("its content is not the one its header names"));
    }
    Ok(raw.into())
}
