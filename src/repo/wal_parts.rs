//! Files of the archive above 64 MiB: stored in parts, with a small index under the file's own name.
//!
//! Parts are WAL objects like any other, under names that are used once: a salt is drawn for each attempt. The index
//! is a signed header alone; it holds the size and the digest of each part as stored, and is created when all of
//! them are there: that is the commit. An attempt that ended before leaves parts that no index names, for the sweep.
//! Stored from a file, memory holds one part; read back, the file and one part, and it grows by parts that were
//! verified, whatever size an index names. Deliberately absent: reading a part alone.

use bytes::Bytes;

use crate::codec::{Compression, Digest, Hasher, RandomExt};
use crate::pg::WalSegmentName;
use crate::repo::error::Error;
use crate::repo::header::{Header, HeaderBuilder, Section};
use crate::repo::id::ClusterId;
use crate::repo::layout::WalObjectName;
use crate::repo::raw_content::{RawContent, steps};
use crate::repo::repository::Repository;
use crate::repo::wal_object::{Archived, FurtherSections, SealedFile};
use crate::repo::wal_reading::{WalHeader, open_part};
use crate::repo::wal_sealing::{Sealing, WalKey, seal_range};
use crate::repo::wal_target::{Target, WAL_OBJECT_BYTES_MAX, WAL_RAW_BYTES_MAX, wal_target};
use crate::repo::wire::{WireError, WireReader, WireWriter};
use crate::storage::ErrorKind;

/// The raw bytes of a part: with what it becomes stored, a tenth of what one segment takes in memory.
pub const PART_BYTES: usize = 32 << 20;
/// The largest segment that servers are built for, and so the largest file.
pub const PARTED_RAW_BYTES_MAX: u64 = 1 << 30;
/// The smallest parts that a reader takes make so many of the largest file.
const PARTS_MAX: u64 = 1 << 10;

/// The parts of a file, as its index names them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parts {
    salt: [u8; 4],
    /// Size and BLAKE3 of each part as stored.
    stored: Vec<(u64, Digest)>,
}

/// The content of a file whose parts are stored.
#[derive(Debug)]
pub(super) struct PartedContent {
    size: u64,
    salt: [u8; 32],
    digest: Digest,
}

/// Archives a segment in parts of any size, as the format lets a writer do: for small examples and tests of it.
///
/// # Errors
/// As those of [`crate::repo::wal_object::archive_wal`].
pub async fn archive_in_parts(
    repository: &Repository,
    (cluster, segment): (ClusterId, WalSegmentName),
    raw: &RawContent,
    part_bytes: usize,
    key: &WalKey,
    compression: Compression,
) -> Result<Archived, Error> {
    let target = wal_target(repository, cluster, WalObjectName::Segment(segment));
    let sealing = Sealing::new(repository, key, compression);
    SealedFile::in_parts(&sealing, target, raw, part_bytes, Vec::new()).archive(repository, raw).await
}

/// Stores the parts of a file.
///
/// # Errors
/// Also where the file became another one meanwhile: then no index is to name them.
pub(super) async fn store_parts(
    repository: &Repository,
    (cluster, segment): (ClusterId, WalSegmentName),
    raw: &RawContent,
    part_bytes: usize,
    sealing: &Sealing<'_>,
) -> Result<(Parts, PartedContent), Error> {
    let (salt, content_salt) = (repository.keyring().random().array(), sealing.keyring.random().array());
    let mut whole = Hasher::salted(&content_salt);
    let mut stored = Vec::new();
    for (number, range) in (0..).zip(steps(0..raw.size(), part_bytes as u64)) {
        let target = wal_target(repository, cluster, WalObjectName::Part { segment, salt, number });
        let (at, mut so_far) = (target.clone(), whole);
        let sealed = sealing.apart(repository, raw, move |with, raw| {
            let bytes = seal_range(with, &at, raw, range, Some(&mut so_far), Vec::new())?;
            Ok(((bytes.len() as u64, Digest::of(&bytes)), bytes, so_far))
        });
        let (part, bytes, so_far) = sealed.await?;
        whole = so_far;
        stored.push(part);
        store_part(repository, &target, bytes).await?;
    }
    raw.apart(RawContent::confirm).await?;
    let content = PartedContent { size: raw.size(), salt: content_salt, digest: whole.finish() };
    Ok((Parts { salt, stored }, content))
}

async fn store_part(repository: &Repository, target: &Target, bytes: Bytes) -> Result<(), Error> {
    let Err(error) = repository.store().create(&target.key, bytes.clone()).await else { return Ok(()) };
    if !matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::OutcomeUnknown) {
        return Err(error.into());
    }
    match repository.store().get(&target.key, WAL_OBJECT_BYTES_MAX).await {
        Ok(standing) if standing == bytes => Ok(()),
        Ok(_) => Err(Error::Different { object: target.object.clone() }),
        // It did not get there: why is what was said at first.
        Err(absent) if absent.is_absent() => Err(error.into()),
        Err(error) => Err(error.into()),
    }
}

/// Makes the index of a file whose parts are stored; `further` sections go into its header.
pub(super) fn seal_index(
    repository: &Repository,
    target: &Target,
    content: &PartedContent,
    parts: &Parts,
    further: FurtherSections,
) -> Bytes {
    let keyring = repository.keyring();
    let (mut salt, mut wal) = (WireWriter::new(), WireWriter::new());
    salt.raw(&content.salt);
    wal.u64(content.size).raw(content.digest.as_bytes()).raw(Digest::of(&[]).as_bytes());
    let mut header =
        HeaderBuilder::new(target.identity.kind).section(Section::Salt, salt).section(Section::Wal, wal);
    for (section, bytes) in further {
        header = header.section(section, bytes);
    }
    header.section(Section::Parts, encode(parts)).finish_signed(keyring, &target.identity).into()
}

/// Returns the parts that a header names, if it is an index.
pub(super) fn parts_of(header: &Header, wal: &WalHeader, target: &Target) -> Result<Option<Parts>, Error> {
    if !header.has(Section::Parts) {
        return Ok(None);
    }
    if wal.raw_size > PARTED_RAW_BYTES_MAX {
        return Err(Error::damaged(&target.object, "its header names an impossible size"));
    }
    let parts = decode(header.section(Section::Parts, &target.object)?);
    parts.map(Some).map_err(|error| target.damaged_header(error))
}

/// Reads and opens all parts of a file; the caller compares the content with the digest in the index.
pub(super) async fn read_parts(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
    parts: &Parts,
    raw_size: u64,
) -> Result<Vec<u8>, Error> {
    let mut raw: Vec<u8> = Vec::new();
    for number in 0..parts.stored.len() {
        let (target, bytes) = read_part(repository, cluster, segment, parts, number).await?;
        let (here, opened) = (repository.clone(), target.clone());
        let content = repository.compute(move || open_part(&here, &opened, &bytes)).await?;
        if (raw.len() + content.len()) as u64 > raw_size {
            return Err(Error::damaged(&target.object, "its file is shorter than its parts"));
        }
        raw.extend_from_slice(&content);
    }
    Ok(raw)
}

/// Checks that all parts of a file are stored as its index names them, without any private key.
pub(super) async fn verify_parts(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
    parts: &Parts,
) -> Result<(), Error> {
    for number in 0..parts.stored.len() {
        read_part(repository, cluster, segment, parts, number).await?;
    }
    Ok(())
}

/// Reads a part as it is stored. One that is missing is damage: the file's own name is there.
async fn read_part(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
    parts: &Parts,
    number: usize,
) -> Result<(Target, Bytes), Error> {
    let (size, digest) = parts.stored[number];
    let name = WalObjectName::Part { segment, salt: parts.salt, number: number as u32 };
    let target = wal_target(repository, cluster, name);
    let bytes = match repository.store().get(&target.key, WAL_OBJECT_BYTES_MAX).await {
        Err(error) if error.is_absent() => return Err(Error::damaged(&target.object, "it is missing")),
        read => read?,
    };
    if bytes.len() as u64 != size || Digest::of(&bytes) != digest {
        return Err(Error::damaged(&target.object, "it is not the one that the index of its file names"));
    }
    Ok((target, bytes))
}

fn encode(parts: &Parts) -> WireWriter {
    let mut section = WireWriter::new();
    section.raw(&parts.salt).varint(parts.stored.len() as u64);
    for (size, digest) in &parts.stored {
        section.varint(*size).raw(digest.as_bytes());
    }
    section
}

fn decode(mut section: WireReader<'_>) -> Result<Parts, WireError> {
    let salt = section.array()?;
    let count = section.bounded("count of parts", PARTS_MAX)?;
    let mut stored = Vec::new();
    for _ in 0..count {
        let size = section.bounded("stored size of a part", WAL_RAW_BYTES_MAX * 2)?;
        stored.push((size, Digest(section.array()?)));
    }
    section.finish().map(|()| Parts { salt, stored })
}

#[cfg(test)]
mod tests;
