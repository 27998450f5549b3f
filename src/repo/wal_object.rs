//! WAL in the archive: one object a segment, sealed in frames, with a signed header that says what is inside.
//!
//! Raw size and a salted digest of the raw content stand in the header, so that a host without the private key can
//! tell "the same again" from "something different under this name" by reading a few hundred bytes. An object is
//! created once; whatever the answer to a put, what stands there afterwards is read and compared.
//! What is above 64 MiB is stored in parts (`wal_parts`); a segment may be superseded by another (`wal_forced`), and
//! whoever reads a segment by its name reads the newest one.

use bytes::Bytes;

use crate::codec::{Compression, Digest, Hasher};
use crate::pg::{Lsn, TimelineId, WalSegmentName};
use crate::repo::error::Error;
use crate::repo::header::{Header, Section};
use crate::repo::id::ClusterId;
use crate::repo::identity::{Identity, ObjectKind};
use crate::repo::keyring::{ContentKey, KeyEnvelope, Keyring};
use crate::repo::layout::WalObjectName;
use crate::repo::raw_content::RawContent;
use crate::repo::repository::Repository;
use crate::repo::sealed::open_all;
use crate::repo::wal_forced;
use crate::repo::wal_parts::{
    PARTED_RAW_BYTES_MAX, Parts, parts_of, read_parts, seal_index, store_parts, verify_parts,
};
use crate::repo::wal_sealing::{Sealing, refuse_above, seal_file};
use crate::repo::wire::{WireError, WireWriter};
use crate::storage::{self, ErrorKind, ObjectKey};

pub use crate::repo::archive_head::{ArchiveHead, archive_head, newest_head};
pub use crate::repo::wal_forced::{is_superseded, mend_wal, newest_wal, supersede_wal};
pub use crate::repo::wal_parts::{PART_BYTES, archive_in_parts};
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
    body: Body,
}

#[derive(Debug)]
enum Body {
    Whole(Bytes),
    /// Each part is sealed when it is stored: memory holds one.
    InParts {
        raw: RawContent,
        key: WalKey,
        compression: Compression,
    },
}

/// The place of a file in the archive, where something stands already, or may stand.
#[derive(Debug)]
pub struct TakenPlace {
    target: Box<Target>,
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
    pub(super) key: ContentKey,
    pub(super) envelope: KeyEnvelope,
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

/// The largest file that is one object.
pub const WAL_RAW_BYTES_MAX: u64 = 64 << 20;
/// A segment that does not compress, its index and its header.
pub(super) const WAL_OBJECT_BYTES_MAX: u64 = WAL_RAW_BYTES_MAX + (2 << 20);
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
/// `Different` where another file stands under the name, or supersedes what stands there.
pub async fn archive_wal(
    repository: &Repository,
    cluster: ClusterId,
    name: WalObjectName,
    raw: &[u8],
    key: &WalKey,
    compression: Compression,
) -> Result<Archived, Error> {
    let raw = Bytes::copy_from_slice(raw).into();
    let sealing = Sealing { keyring: repository.keyring(), key, compression };
    archive(repository, wal_target(repository, cluster, name), &raw, &sealing, Vec::new()).await
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
    let target = history_target(repository, cluster, timeline);
    let raw = Bytes::copy_from_slice(raw).into();
    let sealing = Sealing { keyring: repository.keyring(), key, compression: Compression::zstd(1) };
    archive(repository, target, &raw, &sealing, encode_branch(branch)).await
}

/// Compresses and seals a segment, a partial segment or a backup history file.
pub fn seal_wal(
    repository: &Repository,
    cluster: ClusterId,
    name: WalObjectName,
    raw: &RawContent,
    key: &WalKey,
    compression: Compression,
) -> Result<SealedFile, Error> {
    let target = wal_target(repository, cluster, name);
    let body = if target.is_stored_in_parts(raw) {
        Body::InParts { raw: raw.clone(), key: key.clone(), compression }
    } else {
        let sealing = Sealing { keyring: repository.keyring(), key, compression };
        Body::Whole(seal_file(&sealing, &target, raw, Vec::new())?)
    };
    Ok(SealedFile { target, body })
}

/// Compresses and seals a timeline history file.
pub fn seal_history(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
    branch: HistoryBranch,
    raw: &RawContent,
    key: &WalKey,
) -> Result<SealedFile, Error> {
    let target = history_target(repository, cluster, timeline);
    let sealing = Sealing { keyring: repository.keyring(), key, compression: Compression::zstd(1) };
    let bytes = seal_file(&sealing, &target, raw, encode_branch(branch))?;
    Ok(SealedFile { target, body: Body::Whole(bytes) })
}

impl SealedFile {
    /// Returns how many bytes are held until all is stored.
    pub fn held_len(&self) -> usize {
        match &self.body {
            Body::Whole(bytes) => bytes.len(),
            Body::InParts { raw: RawContent::Memory(bytes), .. } => bytes.len() + 2 * PART_BYTES,
            Body::InParts { raw: RawContent::File(_), .. } => 2 * PART_BYTES,
        }
    }

    /// Creates the object; returns when the store has it durably, or has something else in its place.
    pub async fn store(self, repository: &Repository) -> Result<Stored, Error> {
        let Self { target, body } = self;
        match body {
            Body::Whole(bytes) => create(repository, target, bytes).await,
            Body::InParts { raw, key, compression } => {
                let sealing = Sealing { keyring: repository.keyring(), key: &key, compression };
                create_in_parts(repository, target, &raw, PART_BYTES, &sealing, Vec::new()).await
            }
        }
    }
}

impl TakenPlace {
    /// Decides whether the archive has what was to be archived: all of it, because the server removes its segment once
    /// it is told so, and a header vouches for no body. Of a segment the newest counts, where it was superseded.
    ///
    /// # Errors
    /// `Different` where it is another file; where nothing stands there after all, why nothing could be put there.
    pub async fn compare(self, repository: &Repository, raw: &RawContent) -> Result<Archived, Error> {
        let Self { target, doubt } = self;
        let standing = match (compare(repository, &target, raw).await, doubt) {
            (Err(error), Some(doubt)) if error.is_absent() => return Err(doubt.into()),
            (standing, _) => standing,
        };
        match target.name {
            Some(WalObjectName::Segment(segment)) => {
                wal_forced::settle(repository, target.identity.cluster, segment, raw, standing).await
            }
            _ => standing,
        }
    }
}

/// Reads a file of the archive back, every byte verified; of a segment the newest, where it was superseded.
pub async fn read_wal(
    repository: &Repository,
    cluster: ClusterId,
    name: WalObjectName,
) -> Result<Bytes, Error> {
    match name {
        WalObjectName::Segment(segment) => wal_forced::read_segment(repository, cluster, segment).await,
        _ => read(repository, &wal_target(repository, cluster, name)).await,
    }
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
    let (header, wal) = read_verified(repository, &target, &bytes)?;
    verify_content(repository, &target, &header, &wal).await?;
    Ok(wal)
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
pub(super) struct Target {
    pub(super) key: ObjectKey,
    pub(super) identity: Identity,
    pub(super) object: String,
    /// Its name in the WAL of its cluster; a timeline history file has none.
    name: Option<WalObjectName>,
}

impl Target {
    /// The segment it is, or is about; a timeline history file has none.
    fn segment(&self) -> Option<WalSegmentName> {
        self.name.map(|name| name.segment())
    }

    fn is_stored_in_parts(&self, raw: &RawContent) -> bool {
        self.name.is_some() && raw.size() > WAL_RAW_BYTES_MAX
    }
}

fn encode_branch(branch: HistoryBranch) -> Vec<(Section, WireWriter)> {
    let mut section = WireWriter::new();
    section.u32(branch.parent.get()).u64(branch.switch.0);
    vec![(Section::History, section)]
}

pub(super) fn wal_target(repository: &Repository, cluster: ClusterId, name: WalObjectName) -> Target {
    let key = repository.layout().wal_object(cluster, name);
    let leaf = key.as_str().rsplit('/').next().unwrap_or_default().to_owned();
    let timeline = Some(name.segment().timeline());
    let object = format!("WAL file {leaf}");
    let identity = Identity { name: leaf, ..repository.identity(ObjectKind::Wal, cluster, timeline) };
    Target { key, identity, object, name: Some(name) }
}

fn history_target(repository: &Repository, cluster: ClusterId, timeline: TimelineId) -> Target {
    let name = format!("{}.history", timeline.hex8());
    let object = format!("timeline history file {name}");
    let identity = Identity { name, ..repository.identity(ObjectKind::History, cluster, Some(timeline)) };
    Target { key: repository.layout().history(cluster, timeline), identity, object, name: None }
}

/// Creates an object, in whose header `further` sections stand, or compares what stands there.
pub(super) async fn archive(
    repository: &Repository,
    target: Target,
    raw: &RawContent,
    sealing: &Sealing<'_>,
    further: Vec<(Section, WireWriter)>,
) -> Result<Archived, Error> {
    let stored = if target.is_stored_in_parts(raw) {
        create_in_parts(repository, target, raw, PART_BYTES, sealing, further).await?
    } else {
        let at = target.clone();
        let sealed = sealing.apart(repository, raw, move |with, raw| seal_file(with, &at, raw, further));
        create(repository, target, sealed.await?).await?
    };
    match stored {
        Stored::Created => Ok(Archived::Created),
        Stored::Taken(place) => place.compare(repository, raw).await,
    }
}

async fn create(repository: &Repository, target: Target, bytes: Bytes) -> Result<Stored, Error> {
    match repository.store().create(&target.key, bytes).await {
        Ok(()) => Ok(Stored::Created),
        Err(error) => match error.kind() {
            ErrorKind::AlreadyExists => {
                Ok(Stored::Taken(TakenPlace { target: Box::new(target), doubt: None }))
            }
            ErrorKind::OutcomeUnknown => {
                Ok(Stored::Taken(TakenPlace { target: Box::new(target), doubt: Some(error) }))
            }
            _ => Err(error.into()),
        },
    }
}

pub(super) async fn create_in_parts(
    repository: &Repository,
    target: Target,
    raw: &RawContent,
    part_bytes: usize,
    sealing: &Sealing<'_>,
    further: Vec<(Section, WireWriter)>,
) -> Result<Stored, Error> {
    refuse_above(PARTED_RAW_BYTES_MAX, &target, raw.size())?;
    // The archiver repeats what it was not told of: parts are not stored again for that.
    match repository.store().head(&target.key).await {
        Ok(_) => return Ok(Stored::Taken(TakenPlace { target: Box::new(target), doubt: None })),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let Some(segment) = target.segment() else {
        return Err(Error::Internal(format!("{} is no WAL", target.object)));
    };
    let place = (target.identity.cluster, segment);
    let (parts, content) = store_parts(repository, place, raw, part_bytes, sealing).await?;
    let index = seal_index(repository, &target, &content, &parts, further);
    create(repository, target, index).await
}

pub(super) async fn compare(
    repository: &Repository,
    target: &Target,
    raw: &RawContent,
) -> Result<Archived, Error> {
    let bytes = repository.store().get(&target.key, WAL_OBJECT_BYTES_MAX).await?;
    let (header, wal) = read_verified(repository, target, &bytes)?;
    let salted = Hasher::salted(&wal.salt);
    if wal.raw_size != raw.size() || wal.content_digest != raw.apart(move |raw| raw.digest(salted)).await? {
        return Err(Error::Different { object: target.object.clone() });
    }
    verify_content(repository, target, &header, &wal).await?;
    Ok(Archived::Identical)
}

/// Verifies what an index stands for; of any other object nothing is left to verify.
async fn verify_content(
    repository: &Repository,
    target: &Target,
    header: &Header,
    wal: &WalHeader,
) -> Result<(), Error> {
    match (parts_of(header, wal, target)?, target.segment()) {
        (Some(parts), Some(segment)) => {
            verify_parts(repository, target.identity.cluster, segment, &parts).await
        }
        _ => Ok(()),
    }
}

pub(super) async fn read_front(repository: &Repository, target: &Target) -> Result<Bytes, Error> {
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

pub(super) fn parse_verified(
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

/// Reads a file back; one in parts is put together.
pub(super) async fn read(repository: &Repository, target: &Target) -> Result<Bytes, Error> {
    let bytes = repository.store().get(&target.key, WAL_OBJECT_BYTES_MAX).await?;
    let (here, opened) = (repository.clone(), target.clone());
    let (parts, wal) = match repository.compute(move || open(&here, &opened, &bytes)).await? {
        Opened::Whole(raw) => return Ok(raw),
        Opened::Index(parts, wal) => (parts, wal),
    };
    let segment = target.segment().ok_or_else(|| Error::damaged(&target.object, "it has parts"))?;
    let raw = read_parts(repository, target.identity.cluster, segment, &parts, wal.raw_size).await?;
    let object = target.object.clone();
    let check = move || {
        let whole = raw.len() as u64 == wal.raw_size && Digest::salted(&wal.salt, &raw) == wal.content_digest;
        let damaged = || Error::damaged(object, "its parts do not make up the file that it names");
        if whole { Ok(raw.into()) } else { Err(damaged()) }
    };
    repository.compute(check).await
}

enum Opened {
    Whole(Bytes),
    Index(Parts, WalHeader),
}

/// Opens a whole object: nothing is decrypted or inflated but what the header's signer wrote.
fn open(repository: &Repository, target: &Target, bytes: &[u8]) -> Result<Opened, Error> {
    let (header, wal) = read_verified(repository, target, bytes)?;
    if let Some(parts) = parts_of(&header, &wal, target)? {
        return Ok(Opened::Index(parts, wal));
    }
    open_content(repository, target, bytes, &header, &wal).map(Opened::Whole)
}

/// Verifies and opens an object that is a part of a file, all of it.
pub(super) fn open_part(repository: &Repository, target: &Target, bytes: &[u8]) -> Result<Bytes, Error> {
    let (header, wal) = read_verified(repository, target, bytes)?;
    open_content(repository, target, bytes, &header, &wal)
}

fn open_content(
    repository: &Repository,
    target: &Target,
    bytes: &[u8],
    header: &Header,
    wal: &WalHeader,
) -> Result<Bytes, Error> {
    let damaged = |detail: &str| Error::damaged(&target.object, detail);
    if wal.raw_size > WAL_RAW_BYTES_MAX {
        return Err(damaged("its header names an impossible size"));
    }
    let (keyring, identity, mut digest) = (repository.keyring(), &target.identity, Hasher::salted(&wal.salt));
    let mut raw = repository.buffers().take(wal.raw_size as usize);
    open_all(bytes, header, keyring, identity, &target.object, &mut raw, &mut digest)?;
    if digest.finish() != wal.content_digest {
        return Err(damaged("its content is not the one its header names"));
    }
    Ok(raw.into())
}
