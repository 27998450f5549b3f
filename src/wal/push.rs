//! One WAL file from `pg_wal` into the archive: the archive_command.
//!
//! name → data directory → control file → the file, checked against both → sealed → created, or compared with what
//! stands there. A file is archived only as what it is: a recycled segment under a future name, a truncated one, one
//! of another cluster and anything from a clone are refused. `Ok` means that the archive has it durably. What stands
//! under a segment's name and is something else is left, and only where a person says so the new one supersedes it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::catalog::wal_reader::partial_object;
use crate::codec::{Compression, Hasher};
use crate::disk::{self, CloneMarker, SteadyFile};
use crate::pg::{
    ArchiveFileName, ControlFile, SEGMENT_HEADER_LEN, SegmentHeader, TimelineHistory, WalSegmentName,
    check_segment_header,
};
use crate::repo::layout::WalObjectName;
use crate::repo::wal_object::{
    Archived, HistoryBranch, Replace, SealedFile, Stored, TakenPlace, WalKey, seal_history, seal_wal,
    supersede_wal,
};
use crate::repo::{self, ClusterId, RawContent, Repository};
use crate::wal::Error;
use crate::wal::data_directory::{cluster_of, of_wal_file, read_at_most, read_control_file};

/// A file of `pg_wal` that was found to be what its name says.
#[derive(Debug, Clone)]
pub struct CheckedFile {
    /// Its name.
    pub name: ArchiveFileName,
    /// The cluster that wrote it.
    pub cluster: ClusterId,
    /// What is in it; a segment is read when it is sealed or compared.
    pub content: RawContent,
    branch: Option<HistoryBranch>,
}

/// What is done where something else stands under the name of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnConflict {
    /// The segment is not archived.
    Refuse,
    /// The segment is archived beside it where that is damaged or not trusted, and readers take the segment.
    Mend,
    /// The segment is archived beside it, and readers take the segment.
    Supersede,
}

/// Timeline and backup histories are some lines of text.
const TEXT_BYTES_MAX: u64 = 1 << 20;
/// The line of a backup history that names where the backup starts.
const BACKUP_HISTORY_LINE: &str = "START WAL LOCATION:";

/// Reads and checks the file at `path`, which is `pg_wal/NAME` of some data directory.
pub fn check_file(path: &Path) -> Result<CheckedFile, Error> {
    let data_directory = of_wal_file(path)?;
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let name: ArchiveFileName = name.parse()?;
    if let Some(marker) = CloneMarker::detect(&data_directory)? {
        return Err(Error::Clone { path: data_directory, name: marker.name });
    }
    let control = read_control_file(&data_directory)?;
    let cluster = cluster_of(&control);
    let mut branch = None;
    let content = match name {
        ArchiveFileName::Segment(segment) | ArchiveFileName::Partial(segment) => {
            read_segment(path, segment, &control)?
        }
        ArchiveFileName::History(timeline) => {
            let content = read_text(path)?;
            branch = Some(HistoryBranch::of(&TimelineHistory::parse(timeline, &content)?));
            RawContent::from(content)
        }
        ArchiveFileName::BackupHistory { segment, .. } => {
            segment.number(cluster.segment_size)?;
            let content = read_text(path)?;
            if !content.contains(BACKUP_HISTORY_LINE) {
                return Err(malformed(path, "it names no start of a backup"));
            }
            RawContent::from(content)
        }
    };
    Ok(CheckedFile { name, cluster, content, branch })
}

/// Archives a file; returns when the archive has it durably.
///
/// # Errors
/// `ForeignCluster` where the site is another cluster's (failure 12a).
pub async fn push(
    repository: &Repository,
    file: &CheckedFile,
    compression: Compression,
    on_conflict: OnConflict,
) -> Result<Archived, Error> {
    repository.admit(file.cluster).await?;
    let key = WalKey::create(repository.keyring())?;
    push_admitted(repository, file, &key, compression, on_conflict).await
}

/// Archives a file with a key that is there already; whether the site takes its cluster is the caller's to ask (`admit`).
///
/// Only a segment can be superseded; any other file is archived or refused in any case.
pub async fn push_admitted(
    repository: &Repository,
    file: &CheckedFile,
    key: &WalKey,
    compression: Compression,
    on_conflict: OnConflict,
) -> Result<Archived, Error> {
    let replace = match on_conflict {
        OnConflict::Refuse => None,
        OnConflict::Mend => Some(Replace::Damaged),
        OnConflict::Supersede => Some(Replace::Anything),
    };
    if let (ArchiveFileName::Segment(segment), Some(replace)) = (file.name, replace) {
        let (cluster, raw) = (file.cluster, &file.content);
        return Ok(supersede_wal(repository, cluster, segment, replace, raw, key, compression).await?);
    }
    let (here, checked, with) = (repository.clone(), file.clone(), key.clone());
    let sealed = file.content.apart(move |_| seal(&here, &checked, &with, compression)).await?;
    match sealed.store(repository).await? {
        Stored::Created => Ok(Archived::Created),
        Stored::Taken(place) => compare(repository, file, place).await,
    }
}

/// Compares a file with what stands in its place.
pub async fn compare(
    repository: &Repository,
    file: &CheckedFile,
    place: TakenPlace,
) -> Result<Archived, Error> {
    let compared = place.compare(repository, &file.content).await;
    compared.map_err(|error| match (file.name, error.kind()) {
        (ArchiveFileName::Segment(_), repo::ErrorKind::Damaged) => Error::InPlace(error),
        _ => error.into(),
    })
}

/// Compresses and seals a file; whether the site takes its cluster is the caller's to ask (`admit`).
pub fn seal(
    repository: &Repository,
    file: &CheckedFile,
    key: &WalKey,
    compression: Compression,
) -> Result<SealedFile, Error> {
    let (cluster, content) = (file.cluster, &file.content);
    let name = match (file.name, file.branch) {
        (ArchiveFileName::History(timeline), Some(branch)) => {
            return Ok(seal_history(repository, cluster, timeline, branch, content, key)?);
        }
        (ArchiveFileName::History(timeline), None) => {
            return Err(crate::pg::HistoryError::Empty { timeline }.into());
        }
        (ArchiveFileName::Segment(segment), _) => WalObjectName::Segment(segment),
        // Failure 12b: two servers may leave one timeline with different partials, and both are kept.
        (ArchiveFileName::Partial(segment), _) => partial_object(segment, content.digest(Hasher::new())?),
        (ArchiveFileName::BackupHistory { segment, offset }, _) => {
            WalObjectName::BackupHistory { segment, offset }
        }
    };
    Ok(seal_wal(repository, cluster, name, content, key, compression)?)
}

/// Checks a segment by its beginning and its size; the rest is read when it is sealed, if it is still the same then.
fn read_segment(path: &Path, segment: WalSegmentName, control: &ControlFile) -> Result<RawContent, Error> {
    segment.number(control.wal_segment_size)?;
    let file = SteadyFile::open(path).map_err(of_file)?;
    let mut front = vec![0; file.size().min(SEGMENT_HEADER_LEN as u64) as usize];
    file.read_at(&mut front, 0).map_err(of_file)?;
    let header = check_front(&front, file.size(), segment, control)?;
    if header.timeline > segment.timeline() {
        return Err(Error::LaterTimeline { name: segment.to_string(), found: header.timeline });
    }
    Ok(RawContent::File(Arc::new(file)))
}

fn of_file(error: disk::Error) -> Error {
    match error {
        disk::Error::Changed { path } => Error::Changed { path },
        disk::Error::Io { path, source, .. } => Error::Unreadable { path, source },
        error => error.into(),
    }
}

/// Checks that bytes are a segment of the cluster of a control file.
pub(crate) fn check_segment(
    bytes: &[u8],
    segment: WalSegmentName,
    control: &ControlFile,
) -> Result<SegmentHeader, Error> {
    let front = &bytes[..bytes.len().min(SEGMENT_HEADER_LEN)];
    check_front(front, bytes.len() as u64, segment, control)
}

fn check_front(
    front: &[u8],
    size: u64,
    segment: WalSegmentName,
    control: &ControlFile,
) -> Result<SegmentHeader, Error> {
    let expected = (control.system_identifier, control.wal_segment_size);
    Ok(check_segment_header(front, size, segment, expected)?)
}

fn read_text(path: &Path) -> Result<String, Error> {
    let bytes = read_at_most(path, TEXT_BYTES_MAX)?;
    if bytes.len() as u64 > TEXT_BYTES_MAX {
        return Err(malformed(path, "it is too long"));
    }
    String::from_utf8(bytes).map_err(|_| malformed(path, "it is not text"))
}

fn malformed(path: &Path, detail: &str) -> Error {
    Error::Malformed { path: PathBuf::from(path), detail: detail.to_owned() }
}
