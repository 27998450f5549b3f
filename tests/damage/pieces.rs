//! Pieces of the last segment and heads, sealed and signed: each object × each damage × what a recovery asks for.

use std::sync::Arc;

use bytes::Bytes;
use walden::catalog::ending_segment::read_ending;
use walden::catalog::{RecoveryStart, RecoveryWindow, TimelineTree, WalCoverage};
use walden::clock::{Clock, SystemClock};
use walden::codec::Compression;
use walden::pg::{Lsn, TimelineId, WalSegmentName, WalSegmentNumber};
use walden::repo::layout::WalObjectName;
use walden::repo::wal_object::{ArchiveHead, WalKey, archive_head, archive_piece, archive_wal, newest_head};
use walden::repo::{ClusterId, ErrorKind, Repository};
use walden::storage::{MemoryStore, ObjectKey, Store};

use crate::support::repository::{golden_keys, keyring_in, site_options};

const PIECES: [(u32, u32); 3] = [(0, 9000), (9000, 12_000), (12_000, 20_000)];
const END: u32 = 20_000;

struct Archive {
    store: Arc<MemoryStore>,
    repository: Repository,
    head: ObjectKey,
}

fn cluster() -> ClusterId {
    "7301234567890123456-1".parse().unwrap()
}

fn segment(number: u64) -> WalSegmentName {
    WalSegmentName::new(TimelineId::FIRST, WalSegmentNumber(number), cluster().segment_size)
}

fn end() -> Lsn {
    segment(6).start_lsn(cluster().segment_size).unwrap() + u64::from(END)
}

fn written(from: u32, to: u32) -> Vec<u8> {
    (from..to).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

impl Archive {
    /// Whole segments up to 5, three pieces of the next one, and a head that speaks of them.
    async fn make() -> Self {
        let store = Arc::new(MemoryStore::new());
        let options = site_options(store.clone(), keyring_in(&golden_keys()), SystemClock);
        let repository = Repository::open_or_create(options).await.unwrap().0;
        let (key, zstd) = (WalKey::create(repository.keyring()).unwrap(), Compression::zstd(1));
        for number in 3..=5 {
            let name = WalObjectName::Segment(segment(number));
            archive_wal(&repository, cluster(), name, &[7; 1 << 20], &key, zstd).await.unwrap();
        }
        for (from, to) in PIECES {
            let bytes = written(from, to);
            archive_piece(&repository, cluster(), segment(6), from..to, &bytes, &key, zstd).await.unwrap();
        }
        let head = ArchiveHead { timeline: TimelineId::FIRST, end: end(), written_at: SystemClock.now() };
        let id = archive_head(&repository, cluster(), &head).await.unwrap();
        let head = repository.layout().head(cluster(), TimelineId::FIRST, id);
        Self { store, repository, head }
    }

    fn piece(&self, n: usize) -> ObjectKey {
        let (from, to) = PIECES[n];
        self.repository.layout().wal_object(cluster(), WalObjectName::Piece { segment: segment(6), from, to })
    }

    async fn window(&self) -> RecoveryWindow {
        let first = WalSegmentNumber(0);
        let coverage = WalCoverage::load_timelines(&self.repository, cluster(), [TimelineId::FIRST], first)
            .await
            .unwrap();
        let start_lsn = segment(3).start_lsn(cluster().segment_size).unwrap();
        let start = RecoveryStart { timeline: TimelineId::FIRST, start_lsn, stop_lsn: start_lsn + 0x100 };
        let (tree, size) = (TimelineTree::default(), cluster().segment_size);
        RecoveryWindow::new(start, &tree, &coverage, TimelineId::FIRST, size).unwrap()
    }
}

/// Every damage that needs no second object, and those that bytes of another piece make; nothing where it is removed.
fn damages(whole: &Bytes, other: &Bytes) -> Vec<(&'static str, Option<Bytes>)> {
    let flip = |at: usize| {
        let mut bytes = whole.to_vec();
        bytes[at] ^= 1;
        Some(Bytes::from(bytes))
    };
    vec![
        ("first bit", flip(0)),
        ("middle bit", flip(whole.len() / 2)),
        ("last bit", flip(whole.len() - 1)),
        ("cut", Some(whole.slice(..whole.len() / 2))),
        ("empty", Some(Bytes::new())),
        ("longer", Some([&whole[..], b"more"].concat().into())),
        ("replaced", Some(other.clone())),
        ("removed", None),
    ]
}

#[tokio::test]
async fn a_damaged_piece_is_named_and_one_that_is_missing_is_a_hole() {
    let archive = Archive::make().await;
    let expected = {
        let mut whole = written(0, END);
        whole.resize(1 << 20, 0);
        whole
    };
    let read = async || read_ending(&archive.repository, cluster(), segment(6), end()).await;
    assert!(read().await.unwrap() == expected);
    assert_eq!((archive.window().await.end, archive.window().await.holes.len()), (end(), 0));
    for (n, &(from, _)) in PIECES.iter().enumerate() {
        let key = archive.piece(n);
        let whole = archive.store.get(&key, 1 << 20).await.unwrap();
        let other = archive.store.get(&archive.piece((n + 1) % PIECES.len()), 1 << 20).await.unwrap();
        for (damage, bytes) in damages(&whole, &other) {
            let removed = bytes.is_none();
            archive.store.tamper(&key, |_| bytes);
            let error = read().await.unwrap_err();
            let window = archive.window().await;
            if removed {
                // Inside its plan a recovery takes absence for no end; a new plan is shown the hole.
                assert!(error.is_absent(), "{n} {damage}: {error}");
                assert_eq!(window.holes[0].missing[0].first, segment(6), "{n}");
                assert_eq!(window.end + u64::from(END - from), end(), "{n}");
            } else {
                assert_eq!(error.kind(), ErrorKind::Damaged, "{n} {damage}: {error}");
                assert!(error.to_string().contains(".piece"), "{n} {damage}: {error}");
            }
            archive.store.tamper(&key, |_| Some(whole.clone()));
        }
    }
    assert!(read().await.unwrap() == expected);
}

#[tokio::test]
async fn a_head_that_nobody_signed_proves_nothing_and_stops_nobody() {
    let archive = Archive::make().await;
    let whole = archive.store.get(&archive.head, 1 << 20).await.unwrap();
    let later = String::from_utf8(whole.to_vec()).unwrap().replace("\"end\":\"0/", "\"end\":\"F/");
    assert_ne!(later.as_bytes(), &whole[..]);
    let unsigned = whole.slice(..=whole.iter().position(|byte| *byte == b'\n').unwrap());
    let mut damages = damages(&whole, &later.into());
    damages.push(("unsigned", Some(unsigned)));
    for (damage, bytes) in damages {
        archive.store.tamper(&archive.head, |_| bytes);
        let newest = newest_head(&archive.repository, cluster(), TimelineId::FIRST).await.unwrap();
        assert_eq!(newest, None, "{damage}");
        let window = archive.window().await;
        assert_eq!((window.end, window.holes.len()), (end(), 0), "{damage}");
        archive.store.tamper(&archive.head, |_| Some(whole.clone()));
    }
    // The other way round a head is what tells that the tail is missing.
    archive.store.delete(&archive.piece(2)).await.unwrap();
    assert_eq!(archive.window().await.holes.len(), 1);
    archive.store.delete(&archive.head).await.unwrap();
    assert_eq!(
        archive.window().await.holes.len(),
        0,
        "without a head a shorter archive is one like any other"
    );
}
