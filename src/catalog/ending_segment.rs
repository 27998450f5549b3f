//! Reads the segment in which a plan ends, of which the archive may have no more than the beginning.
//!
//! Asked again each time: the whole segment if it has come, else of pieces and `.partial`s the one that holds the most
//! WAL. Whatever is found, it is handed out up to the planned end, filled up with zeros to the size that PostgreSQL
//! asks for, so that the answer does not change when more arrives. Nothing shorter than planned is ever handed out,
//! and nothing padded is ever stored.

use bytes::Bytes;

use crate::catalog::wal_records::WAL_PAGE_BYTES;
use crate::pg::{Lsn, WalRecordStream, WalSegmentName, WalSegmentSize, WalStep};
use crate::repo::layout::{ObjectName, WalObjectName};
use crate::repo::wal_object::{read_pieces, read_wal};
use crate::repo::{ClusterId, Error, ErrorKind, Repository};
use crate::storage;

/// Partials of one segment; each is left by another server that was on the timeline.
const PARTIALS_MAX: usize = 100;
/// Keys asked for at a time: pieces of the segment may stand before its partials.
const PAGE: usize = 1000;

/// Reads a segment that was archived: the object itself, or where there is none all of it in pieces.
///
/// # Errors
/// An absent object of the store where there is neither ([`Error::is_absent`]).
pub async fn read_segment(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<Bytes, Error> {
    let absent = match read_wal(repository, cluster, WalObjectName::Segment(segment)).await {
        Err(error) if error.is_absent() => error,
        read => return read,
    };
    let pieces = read_pieces(repository, cluster, segment).await?;
    let is_whole = pieces.len() as u64 == u64::from(cluster.segment_size.bytes());
    if is_whole { Ok(pieces) } else { Err(absent) }
}

/// Reads a segment up to the position `end` in it, and fills it up with zeros.
///
/// # Errors
/// An absent object of the store where the archive does not have all of it ([`Error::is_absent`]).
pub async fn read_ending(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
    end: Lsn,
) -> Result<Bytes, Error> {
    let size = cluster.segment_size;
    let impossible = |detail: String| Error::Internal(detail);
    let start = segment.start_lsn(size).map_err(|error| impossible(error.to_string()))?;
    let length = end.checked_sub(start).filter(|length| (1..=u64::from(size.bytes())).contains(length));
    let length = length.ok_or_else(|| impossible(format!("{end} is not in {segment}")))? as usize;
    let mut unreadable = match read_segment(repository, cluster, segment).await {
        Ok(whole) => return Ok(padded(&whole, length, size)),
        Err(error) => only_damage(error)?,
    };
    let pieces = match read_pieces(repository, cluster, segment).await {
        Ok(pieces) => pieces,
        Err(error) => {
            unreadable = only_damage(error)?;
            Bytes::new()
        }
    };
    if pieces.len() >= length {
        return Ok(padded(&pieces, length, size));
    }
    let partials = list_partials(repository, cluster, segment).await?;
    let mut best = (!partials.is_empty()).then(|| Measured::new(start, &pieces, length, size));
    for partial in partials {
        match read_wal(repository, cluster, partial).await {
            Ok(bytes) => best = best.max(Some(Measured::new(start, &bytes, length, size))),
            Err(error) => unreadable = only_damage(error)?.or(unreadable),
        }
    }
    let key = || repository.layout().wal_object(cluster, WalObjectName::Segment(segment)).to_string();
    match (best, unreadable) {
        // What cannot be read might have held more.
        (_, Some(error)) => Err(error),
        (Some(best), None) => Ok(best.bytes),
        (None, None) => Err(storage::Error::NotFound { key: key() }.into()),
    }
}

/// Keeps an error that something else may make up for, and returns the others.
fn only_damage(error: Error) -> Result<Option<Error>, Error> {
    match error.kind() {
        ErrorKind::Absent => Ok(None),
        ErrorKind::Damaged => Ok(Some(error)),
        _ => Err(error),
    }
}

/// The beginning of a segment, by the WAL it holds.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Measured {
    records_end: Lsn,
    bytes: Bytes,
}

impl Measured {
    fn new(start: Lsn, bytes: &Bytes, length: usize, size: WalSegmentSize) -> Self {
        let bytes = padded(bytes, length, size);
        Self { records_end: end_of_records(start, &bytes, size), bytes }
    }
}

/// Lists the partials of a segment.
pub async fn list_partials(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<Vec<WalObjectName>, Error> {
    let layout = repository.layout();
    let folder = layout.wal_log(cluster, segment.timeline(), segment.log());
    let mut after = layout.wal_object(cluster, WalObjectName::Segment(segment));
    let mut partials = Vec::new();
    loop {
        let page = repository.store().list(&folder, Some(&after), PAGE).await?;
        for object in &page {
            match layout.parse(&object.key) {
                Some(ObjectName::Wal(_, name)) if name.segment() != segment => return Ok(partials),
                Some(ObjectName::Wal(_, name @ WalObjectName::Partial { .. })) => partials.push(name),
                _ => {}
            }
        }
        match page.last() {
            Some(last) if page.len() == PAGE && partials.len() < PARTIALS_MAX => after = last.key.clone(),
            _ => return Ok(partials),
        }
    }
}

/// Returns the position behind the last whole record of a segment that begins at `start`.
pub fn end_of_records(start: Lsn, bytes: &Bytes, size: WalSegmentSize) -> Lsn {
    let mut records = WalRecordStream::new(start, size, WAL_PAGE_BYTES);
    let mut end = start;
    if records.push(start, bytes.clone()).is_err() {
        return end;
    }
    loop {
        match records.next_record() {
            Ok(WalStep::Record(record)) => end = record.end,
            Ok(WalStep::NeedBytes | WalStep::End(_)) => return end,
            Err(_) => {}
        }
    }
}

/// Returns the first `length` bytes of a segment, filled up with zeros to its size.
fn padded(bytes: &Bytes, length: usize, size: WalSegmentSize) -> Bytes {
    let size = size.bytes() as usize;
    if length == size && bytes.len() == size {
        return bytes.clone();
    }
    let mut whole = vec![0; size];
    let length = length.min(bytes.len());
    whole[..length].copy_from_slice(&bytes[..length]);
    whole.into()
}
