//! Segments that take the place of others, and segments in parts: every byte of every object another one, every length,
//! and every object in the place of every other. A reader gets the right segment or an error, what `wal check`
//! looks at finds what the reader meets, and mending brings the segment back.

use std::fs;
use std::sync::Arc;

use bytes::Bytes;
use walden::clock::SystemClock;
use walden::codec::{Compression, SigningKey, SystemRandom, VerifyKey};
use walden::pg::WalSegmentName;
use walden::repo::layout::{ObjectName, WalObjectName};
use walden::repo::wal_object::{
    Archived, Replace, WalKey, archive_in_parts, archive_wal, read_wal, supersede_wal, verify_wal,
};
use walden::repo::{ClusterId, Error, ErrorKind, Keyring, KeyringOptions, Repository};
use walden::storage::{MemoryStore, ObjectKey, Store};

use crate::support::repository::{golden_keys, site_options};

const PART_BYTES: usize = 200;
/// Bytes of a header that tell what a reader has to know: version, features, tags of sections. One bit of them is another
/// release's object as well as a damaged one, and nobody puts another in the place of that.
const TELLING_BYTES_MAX: usize = 12;
/// Mending is tried after every so many damages: it is the same after each.
const MEND_EVERY: usize = 23;

struct Archive {
    store: Arc<MemoryStore>,
    repository: Repository,
    key: WalKey,
}

fn cluster() -> ClusterId {
    "7301234567890123456-1".parse().unwrap()
}

fn segment(number: u32) -> WalSegmentName {
    format!("0000000100000000{number:08X}").parse().unwrap()
}

/// What two segments in parts hold, of three parts the last of which is short.
fn content(number: u32) -> Vec<u8> {
    (0..2 * PART_BYTES as u32 + 50).map(|at| ((at + number).wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

/// A host that signs, and takes nobody else's word.
fn keyring() -> Keyring {
    let pem = |name: &str| fs::read_to_string(golden_keys().join(name)).unwrap();
    Keyring::new(KeyringOptions {
        recipients: Vec::new(),
        wal_recipients: Vec::new(),
        signer: Some(SigningKey::from_pem(&pem("test.sign.pem")).unwrap()),
        trusted_signers: vec![VerifyKey::from_pem(&pem("test.verify.pem")).unwrap()],
        private_keys: Vec::new(),
        random: Arc::new(SystemRandom),
    })
}

impl Archive {
    async fn new() -> Self {
        Self::over(Arc::new(MemoryStore::new())).await
    }

    async fn over(store: Arc<MemoryStore>) -> Self {
        let options = site_options(store.clone(), keyring(), SystemClock);
        let repository = Repository::open_or_create(options).await.unwrap().0;
        let key = WalKey::create(repository.keyring()).unwrap();
        Self { store, repository, key }
    }

    /// Two segments in parts.
    async fn in_parts() -> Self {
        let archive = Self::new().await;
        for number in [8, 9] {
            archive.push_in_parts(number).await;
        }
        archive
    }

    async fn push_in_parts(&self, number: u32) {
        let (place, raw) = ((cluster(), segment(number)), content(number).into());
        archive_in_parts(&self.repository, place, &raw, PART_BYTES, &self.key, Compression::NONE)
            .await
            .unwrap();
    }

    /// Two segments that were archived as something else, and superseded.
    async fn forced() -> Self {
        let archive = Self::new().await;
        for number in [8, 9] {
            let (repository, key) = (&archive.repository, &archive.key);
            let name = WalObjectName::Segment(segment(number));
            archive_wal(repository, cluster(), name, b"something else", key, Compression::NONE)
                .await
                .unwrap();
            archive.supersede(number, Replace::Anything).await.unwrap();
        }
        archive
    }

    /// Archives what segment `number` is to hold in the place of what stands there.
    async fn supersede(&self, number: u32, replace: Replace) -> Result<Archived, Error> {
        let (repository, key, raw) = (&self.repository, &self.key, content(number).into());
        supersede_wal(repository, cluster(), segment(number), replace, &raw, key, Compression::NONE).await
    }

    /// Reads segment 9 as a process that knows nothing yet.
    async fn read(&self) -> Result<Bytes, Error> {
        let fresh = Self::over(self.store.clone()).await;
        read_wal(&fresh.repository, cluster(), WalObjectName::Segment(segment(9))).await
    }

    async fn objects(&self) -> Vec<(ObjectKey, WalObjectName, Bytes)> {
        let mut objects = Vec::new();
        for object in self.store.list("", None, 1000).await.unwrap() {
            if let Some(ObjectName::Wal(_, name)) = self.repository.layout().parse(&object.key) {
                let bytes = self.store.get(&object.key, object.size).await.unwrap();
                objects.push((object.key, name, bytes));
            }
        }
        objects
    }

    fn put(&self, key: &ObjectKey, bytes: Option<Bytes>) {
        self.store.tamper(key, |_| bytes);
    }

    /// Damages objects, and checks that segment 9 is refused by name, found, and brought back by mending if `mends`.
    /// Returns whether it was taken for damaged, and not for something that a later release has written.
    async fn assert_refused(&self, what: &str, damage: &[(&ObjectKey, Option<Bytes>)], mends: bool) -> bool {
        let mut before = Vec::new();
        for (key, bytes) in damage {
            let size = self.store.head(key).await.map(|found| found.size);
            before.push(match size {
                Ok(size) => Some(self.store.get(key, size).await.unwrap()),
                Err(_) => None,
            });
            self.put(key, bytes.clone());
        }
        let error = self.read().await.expect_err(what);
        let is_newer = matches!(error, Error::NewerFormat { .. });
        assert!(is_newer || error.kind() == ErrorKind::Damaged, "{what}: {error}");
        assert!(error.to_string().contains(&segment(9).to_string()), "{what}: {error}");
        if mends && !is_newer {
            let known: Vec<ObjectKey> = self.objects().await.into_iter().map(|(key, ..)| key).collect();
            let mended = self.supersede(9, Replace::Damaged).await;
            mended.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(self.read().await.unwrap() == content(9), "{what}");
            for (key, ..) in self.objects().await {
                if !known.contains(&key) {
                    self.put(&key, None);
                }
            }
        }
        for ((key, _), bytes) in damage.iter().zip(before) {
            self.put(key, bytes);
        }
        !is_newer
    }

    async fn assert_unharmed(&self, what: &str) {
        let read = self.read().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(read == content(9), "{what}");
    }

    /// Flips each byte of an object, cuts it at each length, and adds to it.
    async fn assert_every_byte_counts(&self, key: &ObjectKey, bytes: &Bytes) {
        let mut telling = 0;
        for at in 0..bytes.len() {
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 1 << (at % 8);
            let what = format!("{key}, byte {at} of {}", bytes.len());
            let flipped = [(key, Some(flipped.into()))];
            telling += usize::from(!self.assert_refused(&what, &flipped, at % MEND_EVERY == 0).await);
        }
        assert!(telling <= TELLING_BYTES_MAX, "{key}: {telling} of {} bytes", bytes.len());
        for len in 0..bytes.len() {
            let what = format!("{key}, {len} bytes of {}", bytes.len());
            let cut = [(key, Some(bytes.slice(..len)))];
            assert!(self.assert_refused(&what, &cut, len % MEND_EVERY == 0).await, "{what}");
        }
        let more = [(key, Some([&bytes[..], b"more"].concat().into()))];
        assert!(self.assert_refused(&format!("{key}, longer"), &more, true).await);
        self.assert_unharmed("put back").await;
    }
}

fn of_segment(objects: &[(ObjectKey, WalObjectName, Bytes)], number: u32) -> Vec<(ObjectKey, Bytes)> {
    let of = objects.iter().filter(|(_, name, _)| name.segment() == segment(number));
    of.map(|(key, _, bytes)| (key.clone(), bytes.clone())).collect()
}

#[tokio::test]
async fn every_byte_of_an_index_and_of_its_parts_counts() {
    let archive = Archive::in_parts().await;
    let objects = of_segment(&archive.objects().await, 9);
    assert_eq!(objects.len(), 4);
    for (key, bytes) in &objects {
        archive.assert_every_byte_counts(key, bytes).await;
    }
}

#[tokio::test]
async fn a_part_stands_for_no_other_and_none_can_be_left_out() {
    let archive = Archive::in_parts().await;
    let all = archive.objects().await;
    let (others, own) = (of_segment(&all, 8), of_segment(&all, 9));
    let (index, parts) = (&own[0], &own[1..]);
    for (n, (key, bytes)) in parts.iter().enumerate() {
        archive.assert_refused(&format!("part {n} is gone"), &[(key, None)], true).await;
        for (m, (other, theirs)) in parts.iter().enumerate().filter(|(m, _)| *m != n) {
            let swapped = [(key, Some(theirs.clone())), (other, Some(bytes.clone()))];
            archive.assert_refused(&format!("parts {n} and {m} are swapped"), &swapped, true).await;
            archive.assert_refused(&format!("part {m} stands for {n} too"), &swapped[..1], true).await;
        }
        let (_, theirs) = &others[1 + n];
        let strange = [(key, Some(theirs.clone()))];
        archive.assert_refused(&format!("part {n} is of another segment"), &strange, true).await;
        let indexed = [(key, Some(index.1.clone()))];
        archive.assert_refused(&format!("the index stands for part {n}"), &indexed, true).await;
        let part = [(&index.0, Some(bytes.clone()))];
        archive.assert_refused(&format!("part {n} stands for the index"), &part, true).await;
    }
    archive.assert_refused("the other index", &[(&index.0, Some(others[0].1.clone()))], true).await;
}

/// Parts that no index names are what an attempt has left that ended, or somebody's who can write to the store.
#[tokio::test]
async fn parts_that_no_index_names_change_nothing() {
    let archive = Archive::in_parts().await;
    let before = archive.objects().await;
    let own = of_segment(&before, 9);
    let (index, bytes) = own[0].clone();
    archive.put(&index, None);
    archive.push_in_parts(9).await;
    let left = archive.objects().await.len() - before.len();
    assert_eq!(left, 3, "each attempt has names of its own");
    archive.assert_unharmed("the parts of two attempts").await;
    archive.put(&index, Some(bytes));
    archive.assert_unharmed("the index of the first attempt").await;
    let (last, part) = own.last().unwrap();
    let further = last.as_str().replace(".2.part", ".3.part");
    assert_ne!(further, last.as_str());
    archive.put(&ObjectKey::parse(&further).unwrap(), Some(part.clone()));
    archive.assert_unharmed("one part more").await;
}

#[tokio::test]
async fn every_byte_of_a_superseding_segment_counts_and_none_is_passed_over_for_what_it_replaced() {
    let archive = Archive::forced().await;
    let objects = of_segment(&archive.objects().await, 9);
    let [(own, standing), (forced, bytes)] = &objects[..] else { panic!("{objects:?}") };
    archive.assert_unharmed("superseded").await;
    archive.assert_every_byte_counts(forced, bytes).await;
    archive.assert_refused("its own object stands for it", &[(forced, Some(standing.clone()))], true).await;
    let others = of_segment(&archive.objects().await, 8);
    let (their_forced, theirs) = &others[1];
    archive.assert_refused("another segment's", &[(forced, Some(theirs.clone()))], true).await;
    let swapped = [(forced, Some(theirs.clone())), (their_forced, Some(bytes.clone()))];
    archive.assert_refused("swapped with another segment's", &swapped, true).await;
    // The same bytes under another name: nobody vouches for that.
    let another = forced.as_str().rsplit_once('.').unwrap().0.to_owned() + ".ffffffff";
    let another = ObjectKey::parse(&another).unwrap();
    archive.assert_refused("a copy under another name", &[(&another, Some(bytes.clone()))], true).await;
    // What was replaced is nobody's concern, whatever becomes of it.
    for bytes in [None, Some(Bytes::new()), Some(bytes.clone())] {
        archive.put(own, bytes);
        archive.assert_unharmed("what was replaced").await;
    }
}

#[tokio::test]
async fn a_check_of_all_bytes_finds_what_a_reader_meets() {
    for archive in [Archive::in_parts().await, Archive::forced().await] {
        let objects = of_segment(&archive.objects().await, 9);
        for (key, bytes) in &objects {
            let mut flipped = bytes.to_vec();
            *flipped.last_mut().unwrap() ^= 1;
            archive.put(key, Some(flipped.into()));
            let name = match archive.repository.layout().parse(key) {
                Some(ObjectName::Wal(_, WalObjectName::Part { segment, .. })) => {
                    WalObjectName::Segment(segment)
                }
                Some(ObjectName::Wal(_, name)) => name,
                other => panic!("{other:?}"),
            };
            let error = verify_wal(&archive.repository, cluster(), name).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Damaged, "{key}: {error}");
            archive.put(key, Some(bytes.clone()));
            verify_wal(&archive.repository, cluster(), name).await.unwrap();
        }
    }
}
