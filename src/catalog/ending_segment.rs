//! Reads the segment in which a plan ends, of which the archive may have no more than the beginning.
//!
//! Asked again each time: the whole segment if it has come, else of pieces and `.partial`s the one that holds the most
//! WAL. Whatever is found, it is handed out up to the planned end, filled up with zeros to the size that PostgreSQL
//! asks for, so that the answer does not change when more arrives. Nothing shorter than planned is ever handed out,
//! and nothing padded is ever stored in the archive. What the archive does not have, a basebackup may carry.

use bytes::Bytes;

use crate::catalog::wal_records::WAL_PAGE_BYTES;
use crate::pg::{Lsn, WalRecordStream, WalSegmentName, WalSegmentSize, WalStep};
use crate::repo::carried_wal::read_carried;
use crate::repo::layout::{ObjectName, WalObjectName};
use crate::repo::wal_object::{read_pieces, read_wal};
use crate::repo::{ClusterId, Error, ErrorKind, Repository};
use crate::storage;

/// Partials of one segment; each is left by another server that was on the timeline.
const PARTIALS_MAX: usize = 100;
/// Keys asked for at a time: pieces of the segment may stand before its partials.
const PAGE: usize = 1000;

/// Reads a segment that was archived: the object itself, or where there is none all of it in pieces; or one that a
/// basebackup carries.
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
    if pieces.len() as u64 == u64::from(cluster.segment_size.bytes()) {
        return Ok(pieces);
    }
    // A beginning that is carried is no segment: the archive may have more of it, in pieces.
    let carried = repository.carried_index().find(cluster, segment);
    match carried.into_iter().find(|carried| carried.end.is_none()) {
        Some(carried) => read_carried(repository, carried, segment, cluster.segment_size).await,
        None => Err(absent),
    }
}

/// Reads the beginning of a segment that a basebackup carries at least up to `end`.
async fn read_carried_beginning(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
    end: Lsn,
) -> Result<Option<Bytes>, Error> {
    let carried = repository.carried_index().find(cluster, segment);
    match carried.into_iter().find(|carried| carried.end.is_some_and(|carried| carried >= end)) {
        Some(carried) => Ok(Some(read_carried(repository, carried, segment, cluster.segment_size).await?)),
        None => Ok(None),
    }
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
    if let Some(carried) = read_carried_beginning(repository, cluster, segment, end).await? {
        return Ok(padded(&carried, length, size));
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
    follow(start, bytes, size).0
}

/// Tells whether the log goes on behind a segment that begins at `start`: its records reach its end, or the server
/// switched to the next one in it. The record that crosses into that is checked by who reads both.
pub fn is_filled(start: Lsn, bytes: &Bytes, size: WalSegmentSize) -> bool {
    follow(start, bytes, size).1
}

/// Reads the records of a segment; returns the position behind the last whole one, and whether the log goes on behind it all.
fn follow(start: Lsn, bytes: &Bytes, size: WalSegmentSize) -> (Lsn, bool) {
    let mut records = WalRecordStream::new(start, size, WAL_PAGE_BYTES);
    let mut end = start;
    if records.push(start, bytes.clone()).is_err() {
        return (end, false);
    }
    loop {
        match records.next_record() {
            Ok(WalStep::Record(record)) => end = record.end,
            Ok(WalStep::NeedBytes) => return (end, bytes.len() as u64 >= u64::from(size.bytes())),
            Ok(WalStep::End(_)) => return (end, false),
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::catalog::wal_reader::partial_object;
    use crate::clock::SystemClock;
    use crate::codec::{Compression, Digest};
    use crate::repo::testing;
    use crate::repo::wal_object::{WalKey, archive_piece, archive_wal};
    use crate::storage::{Fault, Faulty, MemoryStore, ObjectKey, Rule, Store, Verb};

    use super::*;

    const SEGMENT_BYTES: usize = 1 << 20;
    /// WAL of a server of version 15 from 0/900000 on.
    const WAL: &[u8] = include_bytes!("../../tests/data/wal/15-start");
    const START: Lsn = Lsn(0x90_0000);

    struct Archive {
        store: Arc<Faulty<MemoryStore>>,
        repository: Repository,
        key: WalKey,
    }

    fn cluster() -> ClusterId {
        "7301234567890123456-1".parse().unwrap()
    }

    fn segment() -> WalSegmentName {
        "000000010000000000000009".parse().unwrap()
    }

    /// The segment with the first bytes of the WAL in it, as a server keeps it.
    fn filled(length: usize) -> Bytes {
        padded(&Bytes::from_static(WAL), length, cluster().segment_size)
    }

    /// Where the whole records end of the first bytes.
    fn records_end(length: usize) -> Lsn {
        end_of_records(START, &filled(length), cluster().segment_size)
    }

    impl Archive {
        async fn new() -> Self {
            let store = Arc::new(Faulty::new(MemoryStore::new()));
            let repository = testing::site(store.clone(), SystemClock).await;
            let key = WalKey::create(repository.keyring()).unwrap();
            Self { store, repository, key }
        }

        async fn put(&self, name: WalObjectName, raw: &[u8]) -> ObjectKey {
            let (repository, key) = (&self.repository, &self.key);
            archive_wal(repository, cluster(), name, raw, key, Compression::zstd(1)).await.unwrap();
            repository.layout().wal_object(cluster(), name)
        }

        async fn piece(&self, from: usize, to: usize) -> ObjectKey {
            let (from32, to32) = (from as u32, to as u32);
            let (repository, key, zstd) = (&self.repository, &self.key, Compression::zstd(1));
            archive_piece(repository, cluster(), segment(), from32..to32, &WAL[from..to], key, zstd)
                .await
                .unwrap();
            let name = WalObjectName::Piece { segment: segment(), from: from32, to: to32 };
            repository.layout().wal_object(cluster(), name)
        }

        fn damage(&self, key: &ObjectKey) {
            self.store.inner().tamper(key, |bytes| bytes.map(|bytes| bytes.slice(..bytes.len() - 1)));
        }

        async fn read(&self, end: usize) -> Result<Bytes, Error> {
            read_ending(&self.repository, cluster(), segment(), START + end as u64).await
        }

        #[track_caller]
        fn check(read: Result<Bytes, Error>, expected: &Bytes) {
            let read = read.unwrap();
            assert_eq!(read.len(), SEGMENT_BYTES);
            assert!(read == expected, "other bytes than expected");
        }
    }

    #[tokio::test]
    async fn pieces_are_handed_out_up_to_the_planned_end_and_no_shorter() {
        let archive = Archive::new().await;
        assert!(archive.read(100).await.unwrap_err().is_absent());
        archive.piece(0, 9000).await;
        archive.piece(9000, 20_000).await;
        Archive::check(archive.read(20_000).await, &filled(20_000));
        // What came since the plan was made is not part of it.
        Archive::check(archive.read(12_345).await, &filled(12_345));
        assert!(archive.read(20_001).await.unwrap_err().is_absent());
        assert!(read_segment(&archive.repository, cluster(), segment()).await.unwrap_err().is_absent());
        // Nor does the whole segment make the answer another one.
        archive.put(WalObjectName::Segment(segment()), &filled(WAL.len())).await;
        Archive::check(archive.read(20_000).await, &filled(20_000));
        Archive::check(archive.read(SEGMENT_BYTES).await, &filled(WAL.len()));
        for end in [Lsn(START.0 - 1), START, START + SEGMENT_BYTES as u64 + 1] {
            let error = read_ending(&archive.repository, cluster(), segment(), end).await.unwrap_err();
            assert!(matches!(error, Error::Internal(_)), "{end}: {error}");
        }
    }

    #[tokio::test]
    async fn of_partials_and_pieces_the_one_with_the_most_wal_is_taken() {
        let lengths = [10_000, 15_000, 22_000];
        assert!(lengths.is_sorted_by_key(|length| records_end(*length)));
        let [short, middle, long] = lengths;
        let archive = Archive::new().await;
        let partial = async |length| {
            let content = filled(length);
            archive.put(partial_object(segment(), Digest::of(&content)), &content).await
        };
        partial(short).await;
        Archive::check(archive.read(SEGMENT_BYTES).await, &filled(short));
        archive.piece(0, middle).await;
        Archive::check(archive.read(SEGMENT_BYTES).await, &filled(middle));
        let longest = partial(long).await;
        Archive::check(archive.read(SEGMENT_BYTES).await, &filled(long));
        // Cut at a switch point, they have the same to say.
        Archive::check(archive.read(5000).await, &filled(5000));
        // One that cannot be read may be the longest.
        archive.damage(&longest);
        assert_eq!(archive.read(SEGMENT_BYTES).await.unwrap_err().kind(), ErrorKind::Damaged);
        Archive::check(archive.read(middle).await, &filled(middle));
    }

    #[tokio::test]
    async fn damage_is_made_up_for_by_pieces_and_nothing_else_passes_for_absence() {
        let archive = Archive::new().await;
        let whole = archive.put(WalObjectName::Segment(segment()), &filled(WAL.len())).await;
        archive.damage(&whole);
        assert_eq!(archive.read(9000).await.unwrap_err().kind(), ErrorKind::Damaged);
        let first = archive.piece(0, 9000).await;
        Archive::check(archive.read(9000).await, &filled(9000));
        assert_eq!(archive.read(9001).await.unwrap_err().kind(), ErrorKind::Damaged);
        archive.store.inner().delete(&whole).await.unwrap();
        archive.damage(&first);
        assert_eq!(archive.read(9000).await.unwrap_err().kind(), ErrorKind::Damaged);
        for verb in [Verb::Get, Verb::List] {
            archive.store.inject(Rule::on(verb, Fault::Before(crate::storage::ErrorKind::Unreachable)));
            assert_eq!(archive.read(9000).await.unwrap_err().kind(), ErrorKind::Retry, "{verb:?}");
            archive.store.heal();
        }
    }

    #[tokio::test]
    async fn all_of_a_segment_in_pieces_is_the_segment() {
        let archive = Archive::new().await;
        let whole = filled(WAL.len());
        for (from, to) in [(0, 9000), (9000, SEGMENT_BYTES)] {
            let name = WalObjectName::Piece { segment: segment(), from: from as u32, to: to as u32 };
            archive.put(name, &whole[from..to]).await;
        }
        Archive::check(read_segment(&archive.repository, cluster(), segment()).await, &whole);
        Archive::check(archive.read(SEGMENT_BYTES).await, &whole);
    }
}
