//! Sealing a file of the archive, or a part of it, frame by frame from where it is.
//!
//! A frame is read, hashed, compressed and sealed before the next one is: it stays in the processor's cache, and the
//! content is never whole in memory. A key is drawn once and serves many files. Deliberately absent: where the object
//! goes (`wal_object`, `wal_parts`).

use std::ops::Range;

use bytes::Bytes;

use crate::codec::{Compression, Compressor, Hasher, RandomExt};
use crate::repo::error::Error;
use crate::repo::header::Section;
use crate::repo::keyring::{Audience, ContentKey, KeyEnvelope, Keyring};
use crate::repo::raw_content::{RawContent, steps};
use crate::repo::repository::Repository;
use crate::repo::sealed::{CompressedFrame, SealSpec, SealedBody};
use crate::repo::wal_object::FurtherSections;
use crate::repo::wal_target::{Target, WAL_RAW_BYTES_MAX};
use crate::repo::wire::WireWriter;

/// A key for WAL and how it travels; one serves many segments.
#[derive(Debug, Clone)]
pub struct WalKey {
    key: ContentKey,
    envelope: KeyEnvelope,
}

/// How a file is sealed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sealing<'a> {
    pub(super) keyring: &'a Keyring,
    pub(super) key: &'a WalKey,
    pub(super) compression: Compression,
}

/// Frames of a WAL object: larger than a page-map chunk because WAL is read in order.
const FRAME_BYTES: u64 = 128 << 10;

impl WalKey {
    /// Draws a key for what this process will archive.
    pub fn create(keyring: &Keyring) -> Result<Self, Error> {
        let (key, envelope) = keyring.create_key(Audience::Wal)?;
        Ok(Self { key, envelope })
    }
}

impl<'a> Sealing<'a> {
    /// With the keys of a repository.
    pub(super) fn new(repository: &'a Repository, key: &'a WalKey, compression: Compression) -> Self {
        Self { keyring: repository.keyring(), key, compression }
    }

    /// Does what reads `raw` to seal it, as [`RawContent::apart`] does; `repository` is the one whose keys these are.
    pub(super) async fn apart<T: Send + 'static>(
        &self,
        repository: &Repository,
        raw: &RawContent,
        job: impl FnOnce(&Sealing<'_>, &RawContent) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (here, key, compression) = (repository.clone(), self.key.clone(), self.compression);
        raw.apart(move |raw| job(&Sealing::new(&here, &key, compression), raw)).await
    }
}

/// Seals a file that is one object.
pub(super) fn seal_file(
    sealing: &Sealing<'_>,
    target: &Target,
    raw: &RawContent,
    further: FurtherSections,
) -> Result<Bytes, Error> {
    refuse_above(WAL_RAW_BYTES_MAX, target, raw.size())?;
    let sealed = seal_range(sealing, target, raw, 0..raw.size(), None, further)?;
    raw.confirm()?;
    Ok(sealed)
}

/// Seals a range of a file as an object; `whole` takes in what was read. Whether that is still what it was, the caller
/// makes sure of.
pub(super) fn seal_range(
    sealing: &Sealing<'_>,
    target: &Target,
    raw: &RawContent,
    range: Range<u64>,
    mut whole: Option<&mut Hasher>,
    further: FurtherSections,
) -> Result<Bytes, Error> {
    let Sealing { keyring, key: WalKey { key, envelope }, compression } = *sealing;
    let salt = keyring.random().array();
    let raw_size = range.end - range.start;
    let (mut digest, mut buffer) = (Hasher::salted(&salt), Vec::new());
    let spec = SealSpec { keyring, identity: &target.identity, key, envelope };
    let body = Compressor::on_this_thread(compression, |compressor| {
        // Everything is done to a frame while it is in the processor's cache.
        let frames = steps(range, FRAME_BYTES).map(|range| {
            let frame = raw.read(range, &mut buffer)?;
            digest.update(frame);
            if let Some(whole) = &mut whole {
                whole.update(frame);
            }
            CompressedFrame::compress(compressor, frame)
        });
        SealedBody::seal(&spec, &salt, frames)
    })?;
    let mut content = WireWriter::new();
    content.u64(raw_size).raw(digest.finish().as_bytes()).raw(body.digest().as_bytes());
    Ok(body.finish_signed(&spec, [(Section::Wal, content)].into_iter().chain(further)).bytes)
}

/// Refuses what is larger than the format allows.
pub(super) fn refuse_above(max: u64, target: &Target, size: u64) -> Result<(), Error> {
    if size > max { Err(Error::TooLarge { what: target.object.clone(), size, max }) } else { Ok(()) }
}
