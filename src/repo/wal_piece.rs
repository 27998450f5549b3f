//! Pieces: what is there of a segment that is still being written, each byte once, as ranges that begin at 0.
//!
//! A piece is a WAL object like any other, named after its range, so that it is created once and never grows. Read
//! together, pieces are the beginning of their segment and no more: nobody pads them here, and a gap ends them. A
//! receiver that starts again may store some bytes a second time, cut otherwise: then the copies must agree.
//! Deliberately absent: removing pieces once the whole segment is there (the sweep), and what to do where it is.

use std::ops::Range;

use bytes::Bytes;
use futures::StreamExt;

use crate::codec::Compression;
use crate::pg::WalSegmentName;
use crate::repo::error::{Error, ErrorKind};
use crate::repo::id::ClusterId;
use crate::repo::layout::{ObjectName, WalObjectName};
use crate::repo::repository::Repository;
use crate::repo::wal_object::{Archived, WalKey, archive_wal, read_wal, verify_wal};

/// How far the pieces of one segment reach, by their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PieceReach {
    /// Bytes from the beginning of the segment on without a gap.
    pub contiguous: u32,
    /// The end of the furthest piece: more than that only where there is a gap.
    pub furthest: u32,
}

impl PieceReach {
    /// Adds a piece, which does not begin before any that was added.
    pub fn add(&mut self, from: u32, to: u32) {
        if from <= self.contiguous {
            self.contiguous = self.contiguous.max(to);
        }
        self.furthest = self.furthest.max(to);
    }

    /// Returns whether there is a piece behind a gap, which shows that more was written.
    pub fn has_gap(self) -> bool {
        self.furthest > self.contiguous
    }
}

/// Pieces of one segment, so that a listing has an end: of 1 GiB cut into the smallest useful pieces, a WAL page each.
const PIECES_MAX: usize = 1 << 17;
/// Keys asked for at a time.
const PAGE: usize = 1000;
/// Pieces read at a time: they are small, and the store's latency counts.
const READS_MAX: usize = 8;
/// Pieces verified to tell how far they reach: of more than that, bytes stored once more are the cheaper way.
const VERIFIED_MAX: usize = 256;
/// Pieces verified at a time, by a receiver that is to take little memory: one may have 16 MiB.
const VERIFIES_MAX: usize = 4;

/// Archives the bytes `range` of a segment.
///
/// # Errors
/// `Different` where another piece stands under the name.
pub async fn archive_piece(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
    range: Range<u32>,
    bytes: &[u8],
    key: &WalKey,
    compression: Compression,
) -> Result<Archived, Error> {
    let Range { start: from, end: to } = range;
    let fits = from < to && to <= cluster.segment_size.bytes() && bytes.len() == (to - from) as usize;
    if !fits {
        let found = format!("{} bytes are not {from}..{to} of {segment}", bytes.len());
        return Err(Error::Internal(found));
    }
    let name = WalObjectName::Piece { segment, from, to };
    archive_wal(repository, cluster, name, bytes, key, compression).await
}

/// Reads the beginning of a segment, as far as its pieces reach without a gap; nothing where there is none.
///
/// # Errors
/// `Damaged` where two pieces hold different bytes for the same place, or where one cannot be read that no other
/// replaces: what is behind it is not the end of the WAL.
pub async fn read_pieces(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<Bytes, Error> {
    let ranges = list_pieces(repository, cluster, segment).await?;
    let mut reach = PieceReach::default();
    ranges.iter().for_each(|range| reach.add(range.start, range.end));
    let reads = ranges.into_iter().take_while(|range| range.start <= reach.contiguous).map(|range| async {
        let name = WalObjectName::Piece { segment, from: range.start, to: range.end };
        (range, read_wal(repository, cluster, name).await)
    });
    let mut reads = futures::stream::iter(reads).buffered(READS_MAX);
    let mut beginning = Beginning { segment, content: Vec::new() };
    let mut unreadable = None;
    while let Some((range, read)) = reads.next().await {
        match read {
            Ok(bytes) => beginning.join(&range, &bytes)?,
            // Removed between the listing and now, because the whole segment is there.
            Err(error) if error.is_absent() => {}
            Err(error) if error.kind() == ErrorKind::Damaged => {
                tracing::warn!("{error}");
                unreadable = unreadable.or(Some(error));
            }
            Err(error) => return Err(error),
        }
    }
    match unreadable {
        Some(error) if (beginning.content.len() as u64) < u64::from(reach.contiguous) => Err(error),
        _ => Ok(beginning.content.into()),
    }
}

/// Returns how many bytes of a segment there are from its beginning on in pieces that can be used: each is verified as it is
/// stored, which takes no private key. What cannot be read, or is behind some hundreds of pieces, counts as not
/// there.
///
/// # Errors
/// Where the store does not answer.
pub async fn verified_reach(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<u32, Error> {
    let ranges = list_pieces(repository, cluster, segment).await?.into_iter().take(VERIFIED_MAX);
    let verified = ranges.map(|range| async {
        let name = WalObjectName::Piece { segment, from: range.start, to: range.end };
        (range, verify_wal(repository, cluster, name).await)
    });
    let mut verified = futures::stream::iter(verified).buffered(VERIFIES_MAX);
    let mut reach = PieceReach::default();
    while let Some((range, verified)) = verified.next().await {
        if range.start > reach.contiguous {
            break;
        }
        match verified {
            Ok(header) if header.raw_size == u64::from(range.end - range.start) => {
                reach.add(range.start, range.end);
            }
            Ok(header) => {
                tracing::warn!("the piece {range:?} of WAL segment {segment} has {} bytes", header.raw_size);
            }
            Err(error) if error.is_absent() => {}
            Err(error) if error.may_pass() => return Err(error),
            Err(error) => tracing::warn!("{error}"),
        }
    }
    Ok(reach.contiguous)
}

/// Lists the pieces of a segment, ascending by where they begin.
async fn list_pieces(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<Vec<Range<u32>>, Error> {
    let layout = repository.layout();
    let folder = layout.wal_log(cluster, segment.timeline(), segment.log());
    let (mut ranges, mut after) = (Vec::new(), layout.wal_object(cluster, WalObjectName::Segment(segment)));
    loop {
        let page = repository.store().list(&folder, Some(&after), PAGE).await?;
        for object in &page {
            match layout.parse(&object.key) {
                Some(ObjectName::Wal(_, name)) if name.segment() != segment => return Ok(ranges),
                Some(ObjectName::Wal(_, WalObjectName::Piece { from, to, .. })) => ranges.push(from..to),
                _ => {}
            }
        }
        if ranges.len() > PIECES_MAX {
            return Err(Error::damaged(
                format!("WAL segment {segment}"),
                format!("it has more than {PIECES_MAX} pieces"),
            ));
        }
        match page.last() {
            Some(last) if page.len() == PAGE => after = last.key.clone(),
            _ => return Ok(ranges),
        }
    }
}

/// What was put together of a segment so far.
struct Beginning {
    segment: WalSegmentName,
    content: Vec<u8>,
}

impl Beginning {
    /// Adds a piece where it follows, and compares it where its bytes are known; one behind a gap is left out.
    fn join(&mut self, range: &Range<u32>, bytes: &[u8]) -> Result<(), Error> {
        let damaged = |detail: String| Err(Error::damaged(format!("WAL segment {}", self.segment), detail));
        let (from, to) = (range.start as usize, range.end as usize);
        if bytes.len() != to - from {
            return damaged(format!("its piece {from}..{to} has {} bytes", bytes.len()));
        }
        let Some(known) = self.content.get(from..) else { return Ok(()) };
        let common = known.len().min(bytes.len());
        if known[..common] != bytes[..common] {
            return damaged(format!("two of its pieces hold different bytes within {from}..{to}"));
        }
        self.content.extend_from_slice(&bytes[common..]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use proptest::prelude::*;

    use crate::clock::SystemClock;
    use crate::repo::testing;
    use crate::storage::{Fault, Faulty, MemoryStore, ObjectKey, Rule, Store, Verb};

    use super::*;

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

    /// The bytes that a server wrote into the segment.
    fn written(range: &Range<u32>) -> Vec<u8> {
        range.clone().map(|at| (at * 31 % 251) as u8).collect()
    }

    impl Archive {
        async fn new() -> Self {
            let store = Arc::new(Faulty::new(MemoryStore::new()));
            let repository = testing::site(store.clone(), SystemClock).await;
            let key = WalKey::create(repository.keyring()).unwrap();
            Self { store, repository, key }
        }

        async fn put_bytes(&self, range: &Range<u32>, bytes: &[u8]) -> Result<Archived, Error> {
            let (repository, key) = (&self.repository, &self.key);
            let zstd = Compression::zstd(1);
            archive_piece(repository, cluster(), segment(), range.clone(), bytes, key, zstd).await
        }

        async fn put(&self, range: &Range<u32>) -> Archived {
            self.put_bytes(range, &written(range)).await.unwrap()
        }

        fn object(&self, range: &Range<u32>) -> ObjectKey {
            let name = WalObjectName::Piece { segment: segment(), from: range.start, to: range.end };
            self.repository.layout().wal_object(cluster(), name)
        }

        fn damage(&self, range: &Range<u32>) {
            self.store.inner().tamper(&self.object(range), |bytes| {
                let mut bytes = bytes.unwrap().to_vec();
                *bytes.last_mut().unwrap() ^= 1;
                Some(bytes.into())
            });
        }

        async fn read(&self) -> Result<Bytes, Error> {
            read_pieces(&self.repository, cluster(), segment()).await
        }
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    /// Bytes from 0 on that some of these ranges hold.
    fn reach_of<'a>(ranges: impl Iterator<Item = &'a Range<u32>>) -> u32 {
        let ranges: Vec<_> = ranges.collect();
        (0..).find(|at| !ranges.iter().any(|range| range.contains(at))).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

        /// A receiver that starts again anywhere, and pieces that were damaged or removed since.
        #[test]
        fn pieces_read_together_are_what_a_map_of_bytes_holds(
            runs in proptest::collection::vec((0u32..60, proptest::collection::vec((1u32..20, 0u8..8), 1..6)), 0..5),
        ) {
            block_on(async {
                let archive = Archive::new().await;
                // Of each range whether it is whole, damaged or gone.
                let mut states: BTreeMap<(u32, u32), u8> = BTreeMap::new();
                for (from, lengths) in &runs {
                    let mut at = *from;
                    for (length, state) in lengths {
                        let range = at..at + length;
                        let known = states.insert((range.start, range.end), *state);
                        let archived = archive.put(&range).await;
                        prop_assert_eq!(archived == Archived::Identical, known.is_some());
                        at += length;
                    }
                }
                for ((from, to), state) in &states {
                    match state {
                        0 => archive.damage(&(*from..*to)),
                        1 => archive.store.inner().delete(&archive.object(&(*from..*to))).await.unwrap(),
                        _ => {}
                    }
                }
                let of_states = |wanted: fn(u8) -> bool| -> Vec<Range<u32>> {
                    let wanted = states.iter().filter(|(_, state)| wanted(**state));
                    wanted.map(|((from, to), _)| *from..*to).collect()
                };
                let named = reach_of(of_states(|state| state != 1).iter());
                let valid = reach_of(of_states(|state| state > 1).iter());
                match archive.read().await {
                    Ok(bytes) => {
                        prop_assert_eq!(valid, named);
                        prop_assert_eq!(bytes.to_vec(), written(&(0..valid)));
                    }
                    Err(error) => {
                        prop_assert_eq!(error.kind(), ErrorKind::Damaged);
                        prop_assert!(valid < named);
                    }
                }
                let verified = verified_reach(&archive.repository, cluster(), segment()).await.unwrap();
                prop_assert_eq!(verified, valid);
                let mut reach = PieceReach::default();
                let there = of_states(|state| state != 1);
                there.iter().for_each(|range| reach.add(range.start, range.end));
                prop_assert_eq!(reach.contiguous, named);
                prop_assert_eq!(reach.has_gap(), there.iter().any(|range| range.end > named));
                Ok(())
            })?;
        }
    }

    #[tokio::test]
    async fn pieces_that_contradict_each_other_are_damage() {
        let archive = Archive::new().await;
        archive.put(&(0..50)).await;
        let mut other = written(&(30..80));
        other[19] ^= 1;
        archive.put_bytes(&(30..80), &other).await.unwrap();
        let error = archive.read().await.unwrap_err();
        assert!(error.to_string().contains("different bytes within 30..80"), "{error}");
        // Under one name there is one content.
        let error = archive.put_bytes(&(0..50), &[0; 50]).await.unwrap_err();
        assert!(matches!(error, Error::Different { .. }), "{error}");
    }

    #[tokio::test]
    async fn no_more_pieces_are_verified_than_are_worth_it_and_a_store_that_fails_says_nothing_of_them() {
        let archive = Archive::new().await;
        for at in 0..VERIFIED_MAX as u32 + 2 {
            archive.put(&(at..at + 1)).await;
        }
        let reach = || verified_reach(&archive.repository, cluster(), segment());
        assert_eq!(reach().await.unwrap(), VERIFIED_MAX as u32);
        archive.store.inject(Rule::on(Verb::Get, Fault::Before(crate::storage::ErrorKind::Unreachable)));
        assert_eq!(reach().await.unwrap_err().kind(), ErrorKind::Retry);
    }

    #[tokio::test]
    async fn a_piece_is_bound_to_its_place_and_to_its_segment() {
        let archive = Archive::new().await;
        archive.put(&(0..50)).await;
        archive.put(&(50..100)).await;
        let first = archive.store.get(&archive.object(&(0..50)), 1 << 20).await.unwrap();
        archive.store.inner().tamper(&archive.object(&(50..100)), |_| Some(first));
        assert_eq!(archive.read().await.unwrap_err().kind(), ErrorKind::Damaged);
        for (range, bytes) in [(0..0, 0), (5..6, 0), (0..10, 9), (0..(1 << 20) + 1, (1 << 20) + 1)] {
            let error = archive.put_bytes(&range, &vec![0; bytes]).await.unwrap_err();
            assert!(matches!(error, Error::Internal(_)), "{range:?}: {error}");
        }
    }

    #[tokio::test]
    async fn other_objects_of_the_log_are_no_pieces_and_a_store_that_fails_is_no_end() {
        let archive = Archive::new().await;
        assert_eq!(archive.read().await.unwrap(), Bytes::new());
        archive.put(&(0..50)).await;
        let size = cluster().segment_size;
        for name in [
            WalObjectName::Partial { segment: segment(), digest: [1; 4] },
            WalObjectName::Segment(segment().next(size).unwrap()),
            WalObjectName::Piece { segment: segment().next(size).unwrap(), from: 50, to: 60 },
        ] {
            let (repository, key) = (&archive.repository, &archive.key);
            archive_wal(repository, cluster(), name, &[7; 10], key, Compression::NONE).await.unwrap();
        }
        assert_eq!(archive.read().await.unwrap(), written(&(0..50)));
        for verb in [Verb::List, Verb::Get] {
            let fault = Fault::Before(crate::storage::ErrorKind::Unreachable);
            archive.store.inject(Rule::on(verb, fault));
            assert_eq!(archive.read().await.unwrap_err().kind(), ErrorKind::Retry, "{verb:?}");
            archive.store.heal();
        }
    }
}
