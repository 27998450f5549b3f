//! WAL in the archive: one object a segment, sealed in frames, with a signed header that says what is inside.
//!
//! raw bytes → sealed → created → where something stands already, compared with it. Raw size and a salted digest of the
//! raw content stand in the header, so that a host without the private key can tell "the same again" from "something
//! different under this name" by reading a few hundred bytes. An object is created once; whatever the answer to a put,
//! what stands there afterwards is read and compared.
//! What is above 64 MiB is stored in parts (`wal_parts`); a segment may be superseded by another (`wal_forced`), and
//! whoever reads a segment by its name reads the newest one (`wal_reading`).

use bytes::Bytes;

use crate::codec::Compression;
use crate::pg::{Lsn, TimelineHistory, TimelineId};
use crate::repo::error::Error;
use crate::repo::header::Section;
use crate::repo::id::ClusterId;
use crate::repo::layout::WalObjectName;
use crate::repo::raw_content::RawContent;
use crate::repo::repository::Repository;
use crate::repo::wal_forced::settle;
use crate::repo::wal_parts::{PARTED_RAW_BYTES_MAX, seal_index, store_parts};
use crate::repo::wal_reading::compare;
use crate::repo::wal_sealing::{Sealing, refuse_above, seal_file};
use crate::repo::wal_target::{Target, history_target, wal_target};
use crate::repo::wire::WireWriter;
use crate::storage::{self, ErrorKind};

pub use crate::repo::archive_head::{ArchiveHead, archive_head, newest_head};
pub use crate::repo::wal_forced::{Replace, is_superseded, newest_wal, supersede_wal};
pub use crate::repo::wal_parts::{PART_BYTES, archive_in_parts};
pub use crate::repo::wal_piece::{archive_piece, read_pieces, verified_reach};
pub use crate::repo::wal_reading::{
    WalHeader, read_history, read_history_branch, read_wal, read_wal_header, verify_wal,
};
pub use crate::repo::wal_sealing::WalKey;
pub use crate::repo::wal_target::WAL_RAW_BYTES_MAX;

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
    InParts(Parted),
}

/// A file that is stored in parts, each sealed when it is its turn: memory holds one.
#[derive(Debug)]
struct Parted {
    raw: RawContent,
    part_bytes: usize,
    key: WalKey,
    compression: Compression,
    further: FurtherSections,
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

/// The timeline a history file's timeline branched off from, and where; plain in the signed header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryBranch {
    /// The parent timeline.
    pub parent: TimelineId,
    /// Where the new timeline begins.
    pub switch: Lsn,
}

/// What stands in the header of a file besides what every file has there.
pub(super) type FurtherSections = Vec<(Section, WireWriter)>;

/// Histories are some lines of text, whatever segments are compressed with.
const HISTORY_COMPRESSION: Compression = Compression::zstd(1);

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
    let target = wal_target(repository, cluster, name);
    let sealing = Sealing::new(repository, key, compression);
    archive(repository, target, &Bytes::copy_from_slice(raw).into(), &sealing, Vec::new()).await
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
    let sealing = Sealing::new(repository, key, HISTORY_COMPRESSION);
    archive(repository, target, &Bytes::copy_from_slice(raw).into(), &sealing, branch.encode()).await
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
    SealedFile::seal(&Sealing::new(repository, key, compression), target, raw, Vec::new())
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
    SealedFile::seal(&Sealing::new(repository, key, HISTORY_COMPRESSION), target, raw, branch.encode())
}

/// Seals a file, stores it, and compares it with what stands in its place.
pub(super) async fn archive(
    repository: &Repository,
    target: Target,
    raw: &RawContent,
    sealing: &Sealing<'_>,
    further: FurtherSections,
) -> Result<Archived, Error> {
    let sealed =
        sealing.apart(repository, raw, move |with, raw| SealedFile::seal(with, target, raw, further));
    sealed.await?.archive(repository, raw).await
}

impl SealedFile {
    fn seal(
        sealing: &Sealing<'_>,
        target: Target,
        raw: &RawContent,
        further: FurtherSections,
    ) -> Result<Self, Error> {
        // A history that large is refused when it is sealed.
        if target.name.is_some() && raw.size() > WAL_RAW_BYTES_MAX {
            return Ok(Self::in_parts(sealing, target, raw, PART_BYTES, further));
        }
        let body = Body::Whole(seal_file(sealing, &target, raw, further)?);
        Ok(Self { target, body })
    }

    /// Prepares a file that is stored in parts of this size, whatever its own is.
    pub(super) fn in_parts(
        sealing: &Sealing<'_>,
        target: Target,
        raw: &RawContent,
        part_bytes: usize,
        further: FurtherSections,
    ) -> Self {
        let (raw, key, compression) = (raw.clone(), sealing.key.clone(), sealing.compression);
        Self { target, body: Body::InParts(Parted { raw, part_bytes, key, compression, further }) }
    }

    /// Returns how many bytes are held until all is stored.
    pub fn held_len(&self) -> usize {
        match &self.body {
            Body::Whole(bytes) => bytes.len(),
            Body::InParts(Parted { raw: RawContent::Memory(bytes), part_bytes, .. }) => {
                bytes.len() + 2 * part_bytes
            }
            Body::InParts(Parted { raw: RawContent::File(_), part_bytes, .. }) => 2 * part_bytes,
        }
    }

    /// Creates the object; returns when the store has it durably, or has something else in its place.
    pub async fn store(self, repository: &Repository) -> Result<Stored, Error> {
        match self.body {
            Body::Whole(bytes) => create(repository, self.target, bytes).await,
            Body::InParts(parted) => create_in_parts(repository, self.target, parted).await,
        }
    }

    /// Stores the file, or compares it with what stands in its place; `raw` is what was sealed.
    pub(super) async fn archive(self, repository: &Repository, raw: &RawContent) -> Result<Archived, Error> {
        match self.store(repository).await? {
            Stored::Created => Ok(Archived::Created),
            Stored::Taken(place) => place.compare(repository, raw).await,
        }
    }
}

impl Stored {
    fn taken(target: Target, doubt: Option<storage::Error>) -> Self {
        Self::Taken(TakenPlace { target: Box::new(target), doubt })
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
                settle(repository, target.identity.cluster, segment, raw, standing).await
            }
            _ => standing,
        }
    }
}

impl HistoryBranch {
    /// Returns where the timeline of a history branched off.
    pub fn of(history: &TimelineHistory) -> Self {
        let parent = history.parent();
        Self { parent: parent.timeline, switch: parent.lsn }
    }

    fn encode(self) -> FurtherSections {
        let mut section = WireWriter::new();
        section.u32(self.parent.get()).u64(self.switch.0);
        vec![(Section::History, section)]
    }
}

async fn create(repository: &Repository, target: Target, bytes: Bytes) -> Result<Stored, Error> {
    match repository.store().create(&target.key, bytes).await {
        Ok(()) => Ok(Stored::Created),
        Err(error) => match error.kind() {
            ErrorKind::AlreadyExists => Ok(Stored::taken(target, None)),
            ErrorKind::OutcomeUnknown => Ok(Stored::taken(target, Some(error))),
            _ => Err(error.into()),
        },
    }
}

async fn create_in_parts(repository: &Repository, target: Target, parted: Parted) -> Result<Stored, Error> {
    let Parted { raw, part_bytes, key, compression, further } = parted;
    refuse_above(PARTED_RAW_BYTES_MAX, &target, raw.size())?;
    // The archiver repeats what it was not told of: parts are not stored again for that.
    match repository.store().head(&target.key).await {
        Ok(_) => return Ok(Stored::taken(target, None)),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let Some(segment) = target.segment() else {
        return Err(Error::Internal(format!("{} is no WAL", target.object)));
    };
    let (place, sealing) = ((target.identity.cluster, segment), Sealing::new(repository, &key, compression));
    let (parts, content) = store_parts(repository, place, &raw, part_bytes, &sealing).await?;
    let index = seal_index(repository, &target, &content, &parts, further);
    create(repository, target, index).await
}
