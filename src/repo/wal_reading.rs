//! Reading the archive back: a file whole, or what its signed header says of it.
//!
//! header and its signature → body as stored → frames → raw content. Each is verified before what follows is touched, so
//! that nothing is decrypted or inflated but what the header's signer wrote; as far as the body that takes no private
//! key. What is in parts is put together (`wal_parts`), and who reads a segment by its name gets the newest one
//! (`wal_forced`). Deliberately absent: a range of a file; WAL is read in order, and all of it.

use bytes::Bytes;

use crate::codec::{Digest, Hasher};
use crate::pg::{Lsn, TimelineId};
use crate::repo::error::Error;
use crate::repo::header::{Header, Section};
use crate::repo::id::ClusterId;
use crate::repo::layout::WalObjectName;
use crate::repo::raw_content::RawContent;
use crate::repo::repository::Repository;
use crate::repo::sealed::open_all;
use crate::repo::wal_forced;
use crate::repo::wal_object::{Archived, HistoryBranch};
use crate::repo::wal_parts::{Parts, parts_of, read_parts, verify_parts};
use crate::repo::wal_target::{Target, WAL_OBJECT_BYTES_MAX, WAL_RAW_BYTES_MAX, history_target, wal_target};

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

/// Enough of an object for its header with a handful of recipients.
const HEADER_BYTES_GUESS: u64 = 16 << 10;

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
    Ok(read_header(repository, &wal_target(repository, cluster, name)).await?.1)
}

/// Reads where a timeline branched off, without any private key.
pub async fn read_history_branch(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
) -> Result<HistoryBranch, Error> {
    let target = history_target(repository, cluster, timeline);
    let (header, _) = read_header(repository, &target).await?;
    let damaged = |error| target.damaged_header(error);
    let mut section = header.section(Section::History, &target.object)?;
    let parent = section.u32().map_err(damaged)?;
    let switch = Lsn(section.u64().map_err(damaged)?);
    let parent =
        TimelineId::new(parent).ok_or_else(|| Error::damaged(&target.object, "its parent is timeline 0"))?;
    Ok(HistoryBranch { parent, switch })
}

/// Verifies an archived file as it is stored, all of it, without any private key.
pub async fn verify_wal(
    repository: &Repository,
    cluster: ClusterId,
    name: WalObjectName,
) -> Result<WalHeader, Error> {
    let target = wal_target(repository, cluster, name);
    let (header, wal) = read_stored(repository, &target).await?;
    verify_content(repository, &target, &header, &wal).await?;
    Ok(wal)
}

/// Compares a file with the object that stands in its place, all of which is verified, without any private key.
///
/// # Errors
/// `Different` where that is another file.
pub(super) async fn compare(
    repository: &Repository,
    target: &Target,
    raw: &RawContent,
) -> Result<Archived, Error> {
    let (header, wal) = read_stored(repository, target).await?;
    let salted = Hasher::salted(&wal.salt);
    if wal.raw_size != raw.size() || wal.content_digest != raw.apart(move |raw| raw.digest(salted)).await? {
        return Err(Error::Different { object: target.object.clone() });
    }
    verify_content(repository, target, &header, &wal).await?;
    Ok(Archived::Identical)
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

/// Reads the header of an object, and verifies it.
pub(super) async fn read_header(
    repository: &Repository,
    target: &Target,
) -> Result<(Header, WalHeader), Error> {
    let front = read_front(repository, target).await?;
    parse_verified(repository, target, &front)
}

/// Verifies and opens an object that is a part of a file, all of it.
pub(super) fn open_part(repository: &Repository, target: &Target, bytes: &[u8]) -> Result<Bytes, Error> {
    let (header, wal) = verify_stored(repository, target, bytes)?;
    open_content(repository, target, bytes, &header, &wal)
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

/// Reads and verifies a whole object as stored; its body is not kept.
async fn read_stored(repository: &Repository, target: &Target) -> Result<(Header, WalHeader), Error> {
    let bytes = repository.store().get(&target.key, WAL_OBJECT_BYTES_MAX).await?;
    verify_stored(repository, target, &bytes)
}

fn parse_verified(
    repository: &Repository,
    target: &Target,
    bytes: &[u8],
) -> Result<(Header, WalHeader), Error> {
    let object = &target.object;
    let header = Header::parse(bytes, target.identity.kind, object)?;
    header.verify(bytes, repository.keyring(), &target.identity, object)?;
    let damaged = |error| target.damaged_header(error);
    let salt = header.section(Section::Salt, object)?.array().map_err(damaged)?;
    let mut section = header.section(Section::Wal, object)?;
    let raw_size = section.u64().map_err(damaged)?;
    let content_digest = Digest(section.array().map_err(damaged)?);
    let body_digest = Digest(section.array().map_err(damaged)?);
    Ok((header, WalHeader { raw_size, content_digest, body_digest, salt }))
}

/// Verifies a whole object as stored, which takes no private key.
fn verify_stored(
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

enum Opened {
    Whole(Bytes),
    Index(Parts, WalHeader),
}

/// Opens a whole object: nothing is decrypted or inflated but what the header's signer wrote.
fn open(repository: &Repository, target: &Target, bytes: &[u8]) -> Result<Opened, Error> {
    let (header, wal) = verify_stored(repository, target, bytes)?;
    if let Some(parts) = parts_of(&header, &wal, target)? {
        return Ok(Opened::Index(parts, wal));
    }
    open_content(repository, target, bytes, &header, &wal).map(Opened::Whole)
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
