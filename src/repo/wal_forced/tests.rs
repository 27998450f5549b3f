//! Superseding: whom readers take, what a push is told, and every way two of them can meet.

use std::sync::Arc;

use proptest::prelude::*;

use crate::clock::ManualClock;
use crate::repo::error::ErrorKind;
use crate::repo::forced_index::LISTING_AGE_MAX;
use crate::repo::testing;
use crate::repo::wal_object::{archive_wal, read_wal};
use crate::storage::{Fault, Faulty, MemoryStore, ObjectKey, Recording, Rule, Store, Verb};

use super::*;

struct Archive {
    memory: Arc<Faulty<MemoryStore>>,
    calls: Recording<Arc<Faulty<MemoryStore>>>,
    clock: ManualClock,
    repository: Repository,
    key: WalKey,
}

fn cluster() -> ClusterId {
    "7301234567890123456-1".parse().unwrap()
}

fn segment(number: u32) -> WalSegmentName {
    format!("0000000100000000{number:08X}").parse().unwrap()
}

const SEGMENT: u32 = 9;

impl Archive {
    async fn new() -> Self {
        let memory = Arc::new(Faulty::new(MemoryStore::new()));
        let clock = ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap());
        Self::over(memory, clock, 3).await
    }

    /// Another process over the same store, which knows nothing yet.
    async fn over(memory: Arc<Faulty<MemoryStore>>, clock: ManualClock, seed: u64) -> Self {
        let calls = Recording::new(memory.clone());
        let keyring = testing::signing_keyring(seed);
        let repository = testing::site_with(keyring, calls.clone(), clock.clone()).await;
        let key = WalKey::create(repository.keyring()).unwrap();
        Self { memory, calls, clock, repository, key }
    }

    async fn another(&self, seed: u64) -> Self {
        Self::over(self.memory.clone(), self.clock.clone(), seed).await
    }

    async fn push(&self, raw: &[u8]) -> Result<Archived, Error> {
        let name = WalObjectName::Segment(segment(SEGMENT));
        archive_wal(&self.repository, cluster(), name, raw, &self.key, Compression::NONE).await
    }

    async fn force(&self, raw: &[u8]) -> Result<Archived, Error> {
        self.supersede(SEGMENT, Replace::Anything, raw).await
    }

    async fn mend(&self, raw: &[u8]) -> Result<Archived, Error> {
        self.supersede(SEGMENT, Replace::Damaged, raw).await
    }

    async fn supersede(&self, number: u32, replace: Replace, raw: &[u8]) -> Result<Archived, Error> {
        let (repository, segment, raw) = (&self.repository, segment(number), raw.to_vec().into());
        supersede_wal(repository, cluster(), segment, replace, &raw, &self.key, Compression::NONE).await
    }

    /// What a reader gets that knows nothing yet.
    async fn read(&self) -> Result<Bytes, Error> {
        let fresh = self.another(77).await;
        read_wal(&fresh.repository, cluster(), WalObjectName::Segment(segment(SEGMENT))).await
    }

    async fn forced(&self) -> Vec<WalObjectName> {
        list_forced(&self.repository, cluster(), segment(SEGMENT)).await.unwrap()
    }

    fn key_of(&self, name: WalObjectName) -> ObjectKey {
        self.repository.layout().wal_object(cluster(), name)
    }

    async fn flip(&self, name: WalObjectName, at_end: bool) {
        let key = self.key_of(name);
        let mut bytes = self.memory.get(&key, 1 << 20).await.unwrap().to_vec();
        let at = if at_end { bytes.len() - 1 } else { 30 };
        bytes[at] ^= 1;
        self.put(&key, bytes).await;
    }

    /// Lets an object require a feature that nobody knows.
    async fn claim_newer_format(&self, name: WalObjectName) {
        /// Behind magic, kind and version.
        const FEATURES_AT: usize = 8;
        let key = self.key_of(name);
        let mut bytes = self.memory.get(&key, 1 << 20).await.unwrap().to_vec();
        bytes[FEATURES_AT + 2] ^= 1;
        self.put(&key, bytes).await;
    }

    async fn put(&self, key: &ObjectKey, bytes: Vec<u8>) {
        self.memory.delete(key).await.unwrap();
        self.memory.create(key, bytes.into()).await.unwrap();
    }
}

#[tokio::test]
async fn a_reader_takes_the_newest_and_what_it_replaced_stays() {
    let archive = Archive::new().await;
    // Where nothing stands, force makes the segment itself.
    assert_eq!(archive.force(b"a").await.unwrap(), Archived::Created);
    assert!(archive.forced().await.is_empty());
    assert_eq!(archive.force(b"a").await.unwrap(), Archived::Identical);
    assert!(matches!(archive.push(b"b").await, Err(Error::Different { .. })));
    for (raw, count) in [(b"b", 1), (b"c", 2), (b"b", 3), (b"a", 4)] {
        assert_eq!(archive.force(raw).await.unwrap(), Archived::Created);
        assert_eq!(archive.force(raw).await.unwrap(), Archived::Identical);
        assert_eq!(archive.forced().await.len(), count);
        assert_eq!(archive.read().await.unwrap(), &raw[..]);
        // The archiver is told of what readers get, whatever stands under the name itself.
        assert_eq!(archive.push(raw).await.unwrap(), Archived::Identical);
        assert!(matches!(archive.push(b"x").await, Err(Error::Different { .. })));
    }
    archive.force(b"d").await.unwrap();
    assert!(matches!(archive.push(b"a").await, Err(Error::Different { .. })));
    let standing = wal_target(&archive.repository, cluster(), WalObjectName::Segment(segment(SEGMENT)));
    assert_eq!(read(&archive.repository, &standing).await.unwrap(), &b"a"[..]);
}

#[tokio::test]
async fn what_is_damaged_is_superseded_and_until_then_refused() {
    let archive = Archive::new().await;
    archive.push(b"a").await.unwrap();
    for at_end in [false, true] {
        let standing = archive.forced().await.last().copied();
        let name = archive.newest_for_test().await;
        archive.flip(name, at_end).await;
        assert_eq!(archive.read().await.unwrap_err().kind(), ErrorKind::Damaged, "{standing:?}");
        assert_eq!(archive.push(b"a").await.unwrap_err().kind(), ErrorKind::Damaged);
        assert_eq!(archive.force(b"a").await.unwrap(), Archived::Created);
        assert_eq!(archive.read().await.unwrap(), &b"a"[..]);
        assert_eq!(archive.push(b"a").await.unwrap(), Archived::Identical);
    }
    assert_eq!(archive.forced().await.len(), 2);
}

/// It may be one bit that flipped, and what is received is not to wait for a later release.
#[tokio::test]
async fn what_claims_a_newer_format_stays_and_is_superseded() {
    let archive = Archive::new().await;
    archive.push(b"a").await.unwrap();
    for _ in 0..2 {
        let name = archive.newest_for_test().await;
        archive.claim_newer_format(name).await;
        let claiming = archive.memory.get(&archive.key_of(name), 1 << 20).await.unwrap();
        for refused in [archive.read().await.map(|_| ()), archive.push(b"a").await.map(|_| ())] {
            assert!(matches!(refused, Err(Error::NewerFormat { .. })), "{refused:?}");
        }
        assert_eq!(archive.mend(b"a").await.unwrap(), Archived::Created);
        assert_eq!(archive.mend(b"a").await.unwrap(), Archived::Identical);
        assert_eq!(archive.read().await.unwrap(), &b"a"[..]);
        assert_eq!(archive.push(b"a").await.unwrap(), Archived::Identical);
        assert!(matches!(archive.push(b"b").await, Err(Error::Different { .. })));
        assert!(matches!(archive.mend(b"b").await, Err(Error::Different { .. })));
        assert_eq!(archive.memory.get(&archive.key_of(name), 1 << 20).await.unwrap(), claiming);
    }
    assert_eq!(archive.forced().await.len(), 2);
}

impl Archive {
    async fn newest_for_test(&self) -> WalObjectName {
        let newest = newest_forced(&self.repository, cluster(), segment(SEGMENT)).await.unwrap();
        newest.unwrap_or(WalObjectName::Segment(segment(SEGMENT)))
    }
}

#[tokio::test]
async fn of_two_made_at_once_all_readers_take_one_and_a_third_ends_that() {
    let archive = Archive::new().await;
    archive.push(b"a").await.unwrap();
    archive.force(b"b").await.unwrap();
    let first = archive.forced().await[0];
    // The second process did not see the first one's object.
    let (key, bytes) =
        (archive.key_of(first), archive.memory.get(&archive.key_of(first), 1 << 20).await.unwrap());
    archive.memory.delete(&key).await.unwrap();
    archive.force(b"c").await.unwrap();
    archive.memory.create(&key, bytes).await.unwrap();
    let both = archive.forced().await;
    assert_eq!(both.len(), 2);
    let expected: &[u8] = if both[1] == first { b"b" } else { b"c" };
    assert_eq!(archive.read().await.unwrap(), expected);
    // One that nobody can verify may be the one that counts.
    archive.flip(both[0], false).await;
    assert_eq!(archive.read().await.unwrap_err().kind(), ErrorKind::Damaged);
    assert_eq!(archive.force(b"d").await.unwrap(), Archived::Created);
    assert_eq!(archive.read().await.unwrap(), &b"d"[..]);
}

#[tokio::test]
async fn mending_replaces_what_is_damaged_and_nothing_that_differs() {
    let archive = Archive::new().await;
    assert_eq!(archive.mend(b"a").await.unwrap(), Archived::Created);
    for _ in 0..2 {
        assert_eq!(archive.mend(b"a").await.unwrap(), Archived::Identical);
        assert!(matches!(archive.mend(b"b").await, Err(Error::Different { .. })));
        for at_end in [false, true] {
            archive.flip(archive.newest_for_test().await, at_end).await;
            assert_eq!(archive.mend(b"a").await.unwrap(), Archived::Created);
            assert_eq!(archive.read().await.unwrap(), &b"a"[..]);
        }
    }
    assert_eq!(archive.forced().await.len(), 4);
}

/// One of two that were made at once is damaged: the other holds what is pushed, and readers do not get it for that.
#[tokio::test]
async fn the_same_beside_one_that_nobody_can_verify_is_not_yet_in_the_archive() {
    for damaged in [0, 1] {
        let archive = Archive::new().await;
        archive.push(b"a").await.unwrap();
        archive.force(b"b").await.unwrap();
        let first = archive.key_of(archive.forced().await[0]);
        let bytes = archive.memory.get(&first, 1 << 20).await.unwrap();
        archive.memory.delete(&first).await.unwrap();
        archive.force(b"c").await.unwrap();
        archive.memory.create(&first, bytes).await.unwrap();
        let both = archive.forced().await;
        archive.flip(both[damaged], false).await;
        let target = wal_target(&archive.repository, cluster(), both[1 - damaged]);
        let sound = read(&archive.repository, &target).await.unwrap();
        assert_eq!(archive.read().await.unwrap_err().kind(), ErrorKind::Damaged);
        assert_eq!(archive.force(&sound).await.unwrap(), Archived::Created);
        assert_eq!(archive.read().await.unwrap(), sound);
    }
}

#[tokio::test]
async fn what_was_replaced_matters_no_more_when_it_is_damaged_later() {
    for at_end in [false, true] {
        let archive = Archive::new().await;
        archive.push(b"a").await.unwrap();
        archive.force(b"b").await.unwrap();
        let replaced = archive.newest_for_test().await;
        archive.force(b"c").await.unwrap();
        archive.flip(WalObjectName::Segment(segment(SEGMENT)), at_end).await;
        archive.flip(replaced, at_end).await;
        assert_eq!(archive.read().await.unwrap(), &b"c"[..]);
        assert_eq!(archive.push(b"c").await.unwrap(), Archived::Identical);
        assert_eq!(archive.force(b"d").await.unwrap(), Archived::Created);
        assert_eq!(archive.read().await.unwrap(), &b"d"[..]);
    }
}

#[test]
fn those_that_supersede_each_other_are_damage_and_no_way_back() {
    let superseded = |n: u8| Superseded { digest: Digest([n; 32]), name: [n; 4] };
    let claim = |n: u8, supersedes: &[u8]| Claim {
        name: WalObjectName::Forced { segment: segment(SEGMENT), digest: [n; 4] },
        digest: Digest([n; 32]),
        supersedes: Ok(supersedes.iter().map(|n| superseded(*n)).collect()),
    };
    let newest = |claims: &[Claim]| decide(&newest_claims(claims.to_vec()));
    assert_eq!(newest(&[claim(1, &[0]), claim(2, &[1])]).unwrap(), claim(2, &[]).name);
    assert_eq!(newest(&[claim(1, &[0]), claim(2, &[0])]).unwrap(), claim(2, &[]).name);
    newest(&[claim(1, &[2]), claim(2, &[1])]).unwrap_err();
    // What was misread when the other was made was named by another digest, and is replaced all the same.
    let misread = Ok(vec![Superseded { digest: Digest([7; 32]), name: [9; 4] }]);
    let newer = Claim { supersedes: misread, ..claim(2, &[]) };
    assert_eq!(newest(&[claim(9, &[0]), newer]).unwrap(), claim(2, &[]).name);
    newest(&[claim(1, &[0]), Claim { supersedes: Err("flipped".into()), ..claim(2, &[]) }]).unwrap_err();
}

proptest! {
    #[test]
    fn any_section_of_superseded_objects_is_read_or_refused(
        bytes: Vec<u8>, cut in 0usize..80, flip: (usize, u8)
    ) {
        let _ = decode(WireReader::new(&bytes));
        let superseded = [
            Superseded { digest: Digest([7; 32]), name: [0; 4] },
            Superseded { digest: Digest([8; 32]), name: [1, 2, 3, 4] },
        ];
        let mut whole = encode(&superseded).1.finish();
        prop_assert_eq!(decode(WireReader::new(&whole)).unwrap(), superseded);
        let at = flip.0 % whole.len();
        whole[at] ^= flip.1;
        let _ = decode(WireReader::new(&whole));
        whole.truncate(cut);
        let _ = decode(WireReader::new(&whole));
    }
}

#[tokio::test]
async fn an_unsigned_object_beside_a_segment_is_not_believed_and_not_passed_over() {
    let archive = Archive::new().await;
    archive.push(b"a").await.unwrap();
    let name = WalObjectName::Forced { segment: segment(SEGMENT), digest: [1, 2, 3, 4] };
    archive.memory.create(&archive.key_of(name), Bytes::from_static(b"WALDEN")).await.unwrap();
    assert_eq!(archive.read().await.unwrap_err().kind(), ErrorKind::Damaged);
    assert_eq!(archive.force(b"a").await.unwrap(), Archived::Created);
    assert_eq!(archive.read().await.unwrap(), &b"a"[..]);
}

#[tokio::test]
async fn reading_many_segments_asks_once_and_again_after_moments() {
    let archive = Archive::new().await;
    for number in 1..=20 {
        let name = WalObjectName::Segment(segment(number));
        archive_wal(&archive.repository, cluster(), name, b"a", &archive.key, Compression::NONE)
            .await
            .unwrap();
    }
    let reader = archive.another(5).await;
    let lists = || reader.calls.calls().iter().filter(|call| call.verb == Verb::List).count();
    for number in 1..=20 {
        let name = WalObjectName::Segment(segment(number));
        read_wal(&reader.repository, cluster(), name).await.unwrap();
    }
    assert_eq!(lists(), 1);
    archive.force(b"b").await.unwrap();
    let name = WalObjectName::Segment(segment(SEGMENT));
    assert_eq!(read_wal(&reader.repository, cluster(), name).await.unwrap(), &b"a"[..]);
    archive.clock.advance(LISTING_AGE_MAX);
    assert_eq!(read_wal(&reader.repository, cluster(), name).await.unwrap(), &b"b"[..]);
    // What is found damaged is asked about at once.
    archive.flip(WalObjectName::Segment(segment(3)), true).await;
    let damaged = WalObjectName::Segment(segment(3));
    assert!(read_wal(&reader.repository, cluster(), damaged).await.is_err());
    archive.supersede(3, Replace::Anything, b"mended").await.unwrap();
    assert_eq!(read_wal(&reader.repository, cluster(), damaged).await.unwrap(), &b"mended"[..]);
}

#[tokio::test]
async fn a_store_that_fails_says_nothing_about_what_is_newest() {
    let archive = Archive::new().await;
    archive.push(b"a").await.unwrap();
    archive.force(b"b").await.unwrap();
    for verb in [Verb::List, Verb::Get] {
        archive.memory.inject(Rule::on(verb, Fault::Before(crate::storage::ErrorKind::Unreachable)));
        let name = WalObjectName::Segment(segment(SEGMENT));
        let read = read_wal(&archive.repository, cluster(), name).await;
        assert_eq!(read.unwrap_err().kind(), ErrorKind::Retry, "{verb:?}");
        assert_eq!(archive.force(b"c").await.unwrap_err().kind(), ErrorKind::Retry, "{verb:?}");
        assert_eq!(archive.push(b"c").await.unwrap_err().kind(), ErrorKind::Retry, "{verb:?}");
        archive.memory.heal();
    }
    assert_eq!(archive.forced().await.len(), 1);
}
