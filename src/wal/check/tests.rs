//! The check against archives with every kind of gap, by names alone and with objects that are damaged.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use crate::catalog::{RecoveryStart, TimelineCoverage, TimelineTree, WalCoverage};
use crate::clock::SystemClock;
use crate::codec::{Compression, RecipientKey, SigningKey, SystemRandom, VerifyKey};
use crate::pg::{Lsn, TimelineId, WalSegmentName, WalSegmentNumber, WalSegmentSize};
use crate::repo::layout::WalObjectName;
use crate::repo::wal_object::{HistoryBranch, Replace, WalKey, archive_wal, newest_wal, supersede_wal};
use crate::repo::{BasebackupId, ClusterId, Keyring, KeyringOptions, Repository, RepositoryOptions};
use crate::storage::{ErrorKind, Fault, Faulty, MemoryStore, ObjectKey, Rule, Store};

use super::{Continuity, Depth, Names, check};

const SIZE: u32 = 1 << 20;

fn size() -> WalSegmentSize {
    WalSegmentSize::new(SIZE).unwrap()
}

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn coverage(held: &[(u32, &[u64])]) -> WalCoverage {
    let of = |numbers: &[u64]| {
        let mut coverage = TimelineCoverage::default();
        numbers.iter().for_each(|number| coverage.push(WalSegmentNumber(*number)));
        coverage
    };
    WalCoverage { timelines: held.iter().map(|(number, held)| (timeline(*number), of(held))).collect() }
}

fn within(segment: u64) -> Lsn {
    WalSegmentNumber(segment).start_lsn(size()) + 0x28
}

fn basebackup(number: u32, first: u64, last: u64) -> (BasebackupId, RecoveryStart) {
    let id: BasebackupId = format!("20261121T10{first:02}00Z-3fa9").parse().unwrap();
    (id, RecoveryStart { timeline: timeline(number), start_lsn: within(first), stop_lsn: within(last) })
}

fn look(
    held: &[(u32, &[u64])],
    branches: &[(u32, u32, u64)],
    basebackups: &[(BasebackupId, RecoveryStart)],
) -> Continuity {
    let branch = |&(number, parent, switch): &(u32, u32, u64)| {
        (timeline(number), HistoryBranch { parent: timeline(parent), switch: within(switch) })
    };
    let tree = TimelineTree::new(branches.iter().map(branch));
    let coverage = coverage(held);
    let names = Names { size: size(), tree: &tree, damaged_histories: &[], coverage: &coverage, basebackups };
    Continuity::of(names)
}

fn texts(found: &Continuity) -> Vec<String> {
    found.missing.iter().map(ToString::to_string).collect()
}

#[test]
fn holes_between_the_oldest_basebackup_and_the_newest_segment_are_named_once() {
    let backups = [basebackup(1, 3, 3), basebackup(1, 5, 6)];
    let found = look(&[(1, &[1, 3, 4, 5, 6, 9, 10, 12])], &[], &backups);
    assert_eq!(
        texts(&found),
        ["000000010000000000000007 to 000000010000000000000008 (2)", "00000001000000000000000B"]
    );
    assert_eq!((found.older, found.oldest), (1, WalSegmentNumber(3)));
    assert!(found.unrecoverable.is_empty() && !found.is_whole());
    assert!(found.lacks("000000010000000000000008".parse().unwrap()));
    assert!(!found.lacks("000000020000000000000008".parse().unwrap()));
    assert!(!found.lacks("00000001000000000000000A".parse().unwrap()));
    assert!(look(&[(1, &[1, 3, 4, 5, 6])], &[], &backups).is_whole());
}

/// Failures 2 and 9: the history of a timeline, or the segment in which it begins, is not there.
#[test]
fn failures_2_and_9_a_timeline_needs_its_history_and_the_segment_it_began_in() {
    let backups = [basebackup(1, 3, 3)];
    let whole = look(&[(1, &[3, 4, 5]), (2, &[5, 6])], &[(2, 1, 5)], &backups);
    assert!(whole.is_whole(), "{whole:?}");
    let without_history = look(&[(1, &[3, 4, 5]), (2, &[5, 6])], &[], &backups);
    assert_eq!(without_history.missing_histories, [timeline(2)]);
    let without_first = look(&[(1, &[3, 4]), (2, &[6])], &[(2, 1, 5)], &backups);
    assert_eq!(texts(&without_first), ["000000020000000000000005"]);
}

#[test]
fn a_basebackup_without_its_wal_is_named_and_where_there_is_none_every_gap_counts() {
    let found = look(&[(1, &[3])], &[], &[basebackup(1, 3, 4)]);
    assert_eq!(found.unrecoverable.len(), 1);
    assert!(found.unrecoverable[0].1.to_string().contains("000000010000000000000004"));
    let found = look(&[(1, &[3, 5])], &[], &[]);
    assert_eq!(texts(&found), ["000000010000000000000004"]);
    assert_eq!(found.older, 0);
}

proptest! {
    /// Against the plain definition: of one timeline everything from the oldest start to the newest segment.
    #[test]
    fn what_is_missing_is_what_is_not_there(held in prop::collection::btree_set(0_u64..40, 1..40), first in 0_u64..40) {
        let held: Vec<u64> = held.into_iter().collect();
        let backups = [basebackup(1, first, first)];
        let found = look(&[(1, &held)], &[], &backups);
        let last = *held.last().unwrap();
        let expected: BTreeSet<u64> = (first..=last).filter(|number| !held.contains(number)).collect();
        let missing: BTreeSet<u64> = (0..50)
            .filter(|number| found.lacks(WalSegmentName::new(timeline(1), WalSegmentNumber(*number), size())))
            .collect();
        // What a recovery cannot even begin with is told of the basebackup, unless there is more behind it.
        prop_assert_eq!(&missing, &expected);
        prop_assert_eq!(found.older, held.iter().filter(|number| **number < first).count() as u64);
        prop_assert_eq!(found.unrecoverable.is_empty(), held.contains(&first));
    }
}

fn cluster() -> ClusterId {
    "7301234567890123456-1".parse().unwrap()
}

async fn repository(store: Arc<dyn Store>) -> Repository {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden-1/keys");
    let pem = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    // Signed and encrypted, and no private key: what a check has.
    let recipients = || vec![RecipientKey::from_pem(&pem("test.pub.pem")).unwrap()];
    let keyring = Keyring::new(KeyringOptions {
        recipients: recipients(),
        wal_recipients: recipients(),
        signer: Some(SigningKey::from_pem(&pem("test.sign.pem")).unwrap()),
        trusted_signers: vec![VerifyKey::from_pem(&pem("test.verify.pem")).unwrap()],
        private_keys: Vec::new(),
        random: Arc::new(SystemRandom),
    });
    let site = ObjectKey::parse("main").unwrap();
    let options = RepositoryOptions { store, site, keyring, clock: Arc::new(SystemClock) };
    Repository::open_or_create(options).await.unwrap().0
}

fn name(number: u64) -> WalObjectName {
    WalObjectName::Segment(WalSegmentName::new(timeline(1), WalSegmentNumber(number), size()))
}

async fn archive(repository: &Repository, numbers: impl IntoIterator<Item = u64>, bytes: usize) {
    let key = WalKey::create(repository.keyring()).unwrap();
    for number in numbers {
        let zstd = Compression::zstd(1);
        archive_wal(repository, cluster(), name(number), &vec![7; bytes], &key, zstd).await.unwrap();
    }
}

#[tokio::test]
async fn damaged_files_are_named_with_what_is_wrong() {
    let store = Arc::new(MemoryStore::new());
    let repository = repository(store.clone()).await;
    archive(&repository, 3..9, SIZE as usize).await;
    archive(&repository, [9], 4096).await;
    let damaged = |found: &super::Findings| found.clusters[0].examined.damaged.len();
    let key = |number| repository.layout().wal_object(cluster(), name(number));
    // A byte of the header, a byte of the body, an empty file, another's bytes.
    let other = store.get(&key(8), 1 << 24).await.unwrap();
    let flip = |number: u64, at: fn(usize) -> usize| {
        store.tamper(&key(number), |bytes| {
            let mut bytes = bytes.unwrap().to_vec();
            let at = at(bytes.len());
            bytes[at] ^= 1;
            Some(bytes.into())
        });
    };
    flip(4, |_| 20);
    flip(5, |len| len - 1);
    store.tamper(&key(6), |_| Some(Bytes::new()));
    store.tamper(&key(7), |_| Some(other.clone()));
    let found = check(&repository, Depth::Headers).await.unwrap();
    let names: Vec<&str> = found.clusters[0].examined.damaged.iter().map(|file| file.name.as_str()).collect();
    let segments = ["000000010000000000000004", "000000010000000000000006", "000000010000000000000007"];
    assert_eq!(names[..3], segments);
    assert!(names[3].starts_with("000000010000000000000009"), "{names:?}");
    let reason = &found.clusters[0].examined.damaged[3].reason;
    assert!(reason.contains("4096") && reason.contains("1048576"), "{reason}");
    assert_eq!((damaged(&found), found.damaged(), found.is_good()), (4, 4, false));
    let bodies = check(&repository, Depth::Bodies).await.unwrap();
    assert_eq!((damaged(&bodies), bodies.clusters[0].examined.objects), (5, 7));
    // A hole is one whatever is damaged.
    store.delete(&key(3)).await.unwrap();
    store.delete(&key(5)).await.unwrap();
    let found = check(&repository, Depth::Headers).await.unwrap();
    assert_eq!(texts(&found.clusters[0].continuity), ["000000010000000000000005"]);
}

#[tokio::test]
async fn what_is_damaged_is_no_finding_where_something_sound_supersedes_it() {
    let store = Arc::new(MemoryStore::new());
    let repository = repository(store.clone()).await;
    archive(&repository, 3..6, SIZE as usize).await;
    let key = WalKey::create(repository.keyring()).unwrap();
    let raw = vec![8; SIZE as usize].into();
    let segment = name(4).segment();
    let flip_last = |name: WalObjectName| {
        store.tamper(&repository.layout().wal_object(cluster(), name), |bytes| {
            let mut bytes = bytes.unwrap().to_vec();
            *bytes.last_mut().unwrap() ^= 1;
            Some(bytes.into())
        });
    };
    let look = async |depth| {
        let found = check(&repository, depth).await.unwrap();
        let examined = &found.clusters[0].examined;
        (found.is_good(), examined.damaged.len(), examined.superseded.len())
    };
    flip_last(name(4));
    assert_eq!(look(Depth::Bodies).await, (false, 1, 0));
    for round in 1..=2 {
        supersede_wal(&repository, cluster(), segment, Replace::Anything, &raw, &key, Compression::NONE)
            .await
            .unwrap();
        assert_eq!(look(Depth::Headers).await, (true, 0, 0));
        assert_eq!(look(Depth::Bodies).await, (true, 0, round));
        // In its turn it is damaged, and what it replaced counts again as it is.
        flip_last(newest_wal(&repository, cluster(), segment).await.unwrap());
        assert_eq!(look(Depth::Bodies).await, (false, 1 + round, 0));
    }
}

/// A receiver that lost its spool leaves a segment so, and goes on behind it.
#[tokio::test]
async fn pieces_of_a_segment_that_is_not_there_as_a_whole_are_looked_at_however_far_they_reach() {
    let store = Arc::new(MemoryStore::new());
    let repository = repository(store.clone()).await;
    archive(&repository, [3, 5], SIZE as usize).await;
    let key = WalKey::create(repository.keyring()).unwrap();
    let piece = |number, from, to| WalObjectName::Piece { segment: name(number).segment(), from, to };
    let put = async |number, from: u32, to: u32| {
        let (piece, zstd) = (piece(number, from, to), Compression::zstd(1));
        archive_wal(&repository, cluster(), piece, &vec![7; (to - from) as usize], &key, zstd).await.unwrap();
    };
    let look = async || {
        let found = check(&repository, Depth::Bodies).await.unwrap();
        let examined = &found.clusters[0].examined;
        (found.is_good(), examined.damaged.len(), examined.superseded.len())
    };
    let pieces = [(4, 0, 4096), (4, 4096, SIZE), (5, 0, 4096), (6, 0, 4096)];
    for (number, from, to) in pieces {
        put(number, from, to).await;
    }
    for (number, from, to) in pieces {
        let place = repository.layout().wal_object(cluster(), piece(number, from, to));
        let sound = store.get(&place, 1 << 24).await.unwrap();
        store.tamper(&place, |_| Some(Bytes::from_static(b"damaged")));
        // Of a segment that is there as a whole they serve nobody.
        let serves = usize::from(number != 5);
        assert_eq!(look().await, (number == 5, serves, 0), "{number} from {from}");
        store.tamper(&place, |_| Some(sound));
        assert_eq!(look().await, (true, 0, 0), "{number} from {from}");
    }
    // What a receiver stored beside a damaged one.
    let damaged = repository.layout().wal_object(cluster(), piece(6, 0, 4096));
    store.tamper(&damaged, |_| Some(Bytes::from_static(b"damaged")));
    put(6, 0, 4095).await;
    assert_eq!(look().await, (false, 1, 0));
    put(6, 4095, 4096).await;
    assert_eq!(look().await, (true, 0, 1));
}

/// A store that cannot tell is never a good answer, wherever it fails.
#[tokio::test]
async fn a_store_that_fails_at_any_call_is_an_error() {
    let memory = Arc::new(MemoryStore::new());
    archive(&repository(memory.clone()).await, 3..6, SIZE as usize).await;
    let faulty = Arc::new(Faulty::new(memory));
    let opened = repository(faulty.clone()).await;
    assert!(check(&opened, Depth::Headers).await.unwrap().is_good());
    let mut positions = 0;
    loop {
        faulty.inject(Rule::always(Fault::Before(ErrorKind::Unreachable)).skip(positions).times(1));
        let before = faulty.faults();
        let found = check(&opened, Depth::Headers).await;
        let faults = faulty.faults() - before;
        faulty.heal();
        if faults == 0 {
            assert!(found.unwrap().is_good());
            break;
        }
        assert_eq!(found.unwrap_err().kind(), crate::repo::ErrorKind::Retry, "call {positions}");
        positions += 1;
    }
    assert!(positions > 6, "{positions} calls");
}
