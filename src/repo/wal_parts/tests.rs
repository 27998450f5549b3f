//! Parts: put together again, damaged one by one, and an archiver that ends between any two of them.

use std::sync::Arc;

use proptest::prelude::*;

use crate::clock::SystemClock;
use crate::codec::Compression;
use crate::repo::error::ErrorKind;
use crate::repo::layout::ObjectName;
use crate::repo::testing;
use crate::repo::wal_object::{
    Archived, Replace, WalKey, archive_wal, read_wal, read_wal_header, supersede_wal, verify_wal,
};
use crate::storage::{Fault, Faulty, MemoryStore, ObjectKey, Rule, Store, Verb};

use super::*;

struct Archive {
    store: Arc<Faulty<MemoryStore>>,
    repository: Repository,
    key: WalKey,
    raw: Vec<u8>,
}

/// Two parts and a little of a third one.
const RAW_BYTES: usize = 2 * PART_BYTES + 12345;

fn cluster() -> ClusterId {
    "7301234567890123456-128".parse().unwrap()
}

fn segment() -> WalSegmentName {
    "000000010000000000000009".parse().unwrap()
}

fn name() -> WalObjectName {
    WalObjectName::Segment(segment())
}

impl Archive {
    async fn new() -> Self {
        let store = Arc::new(Faulty::new(MemoryStore::new()));
        // Without a signature nobody could tell a part in the place of the index.
        let repository = testing::site_with(testing::signing_keyring(3), store.clone(), SystemClock).await;
        let key = WalKey::create(repository.keyring()).unwrap();
        let mut raw = vec![0; RAW_BYTES];
        raw.iter_mut().step_by(4096).zip(0u32..).for_each(|(byte, n)| *byte = n as u8 ^ (n >> 8) as u8);
        Self { store, repository, key, raw }
    }

    async fn push(&self, raw: &[u8]) -> Result<Archived, Error> {
        archive_wal(&self.repository, cluster(), name(), raw, &self.key, Compression::zstd(1)).await
    }

    async fn read(&self) -> Result<Bytes, Error> {
        read_wal(&self.repository, cluster(), name()).await
    }

    async fn objects(&self) -> Vec<(ObjectKey, WalObjectName)> {
        let listed = self.store.list("", None, 1000).await.unwrap();
        let layout = self.repository.layout();
        let name = |key: ObjectKey| match layout.parse(&key) {
            Some(ObjectName::Wal(_, name)) => Some((key, name)),
            _ => None,
        };
        listed.into_iter().filter_map(|object| name(object.key)).collect()
    }

    /// Puts other bytes in the place of an object, or none, and returns what was there.
    async fn replace(&self, key: &ObjectKey, change: impl FnOnce(&mut Vec<u8>) -> bool) -> Bytes {
        let before = self.store.get(key, WAL_OBJECT_BYTES_MAX).await.unwrap();
        let mut bytes = before.to_vec();
        let stays = change(&mut bytes);
        self.store.delete(key).await.unwrap();
        if stays {
            self.store.create(key, bytes.into()).await.unwrap();
        }
        before
    }
}

#[tokio::test]
async fn a_large_segment_is_stored_in_parts_under_its_own_name_and_comes_back() {
    let archive = Archive::new().await;
    assert_eq!(archive.push(&archive.raw).await.unwrap(), Archived::Created);
    let objects = archive.objects().await;
    assert_eq!(objects.len(), 4, "{objects:?}");
    assert_eq!(objects[0].1, name());
    assert!(archive.store.head(&objects[0].0).await.unwrap().size < 1000);
    assert!(archive.read().await.unwrap() == archive.raw);
    let header = read_wal_header(&archive.repository, cluster(), name()).await.unwrap();
    assert_eq!(header.raw_size, RAW_BYTES as u64);
    verify_wal(&archive.repository, cluster(), name()).await.unwrap();
    // The archiver asks again, and nothing is stored again.
    assert_eq!(archive.push(&archive.raw).await.unwrap(), Archived::Identical);
    let mut other = archive.raw.clone();
    other[RAW_BYTES - 1] ^= 1;
    assert!(matches!(archive.push(&other).await, Err(Error::Different { .. })));
    assert_eq!(archive.objects().await.len(), 4);
    let (key, zstd) = (&archive.key, Compression::zstd(1));
    // To and fro: each index has the same empty body, and still none is taken for another.
    for raw in [&other, &archive.raw, &other] {
        let (repository, raw) = (&archive.repository, raw.clone().into());
        let archived = supersede_wal(repository, cluster(), segment(), Replace::Anything, &raw, key, zstd);
        assert_eq!(archived.await.unwrap(), Archived::Created);
    }
    let fresh = archive.repository.clone();
    fresh.forced_index().note(crate::repo::forced_index::ForcedListing {
        cluster: cluster(),
        timeline: segment().timeline(),
        segments: segment()..=segment(),
        but_last: false,
        forced: vec![segment()],
        listed_at: None,
    });
    assert!(archive.read().await.unwrap() == other);
}

#[tokio::test]
async fn a_part_that_is_damaged_swapped_or_gone_is_damage_and_never_absence() {
    let archive = Archive::new().await;
    archive.push(&archive.raw).await.unwrap();
    let objects = archive.objects().await;
    let second = archive.store.get(&objects[2].0, WAL_OBJECT_BYTES_MAX).await.unwrap();
    for (key, name) in &objects {
        for damage in 0..5 {
            let before = archive
                .replace(key, |bytes| {
                    let (middle, end) = (bytes.len() / 2, bytes.len() - 1);
                    match damage {
                        0 => bytes[middle] ^= 1,
                        1 => bytes[end] ^= 1,
                        2 => bytes.truncate(middle),
                        3 => *bytes = second.to_vec(),
                        _ => return false,
                    }
                    true
                })
                .await;
            let is_itself = damage == 3 && before == second;
            let is_index_gone = damage == 4 && matches!(name, WalObjectName::Segment(_));
            let read = archive.read().await;
            match read {
                Ok(raw) => assert!(is_itself && raw == archive.raw, "{name:?} {damage}"),
                Err(error) if is_index_gone => assert!(error.is_absent(), "{error}"),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Damaged, "{name:?} {damage}: {error}");
                    assert!(error.to_string().contains(&segment().to_string()), "{error}");
                    let pushed = archive.push(&archive.raw).await.unwrap_err();
                    assert_eq!(pushed.kind(), ErrorKind::Damaged, "{name:?} {damage}: {pushed}");
                    verify_wal(&archive.repository, cluster(), self::name()).await.unwrap_err();
                }
            }
            if damage != 4 {
                archive.store.delete(key).await.unwrap();
            }
            archive.store.create(key, before).await.unwrap();
        }
    }
    assert!(archive.read().await.unwrap() == archive.raw);
}

#[tokio::test]
async fn an_attempt_that_ends_between_parts_and_index_leaves_garbage_and_no_segment() {
    for position in 0..4 {
        for lost in [false, true] {
            let archive = Archive::new().await;
            let kind = crate::storage::ErrorKind::Unreachable;
            // An answer that is lost is settled by reading back; a store that has gone is not there for that either.
            let fault = if lost {
                Fault::After(crate::storage::ErrorKind::OutcomeUnknown)
            } else {
                Fault::Before(kind)
            };
            archive.store.inject(Rule::on(Verb::Create, fault).skip(position).times(1));
            let pushed = archive.push(&archive.raw).await;
            assert_eq!(archive.store.faults(), 1);
            archive.store.heal();
            if lost {
                assert!(pushed.is_ok(), "{position}: {pushed:?}");
            } else {
                assert_eq!(pushed.unwrap_err().kind(), ErrorKind::Retry);
                assert!(archive.read().await.unwrap_err().is_absent(), "{position}");
                assert_eq!(archive.objects().await.len(), position);
                assert_eq!(archive.push(&archive.raw).await.unwrap(), Archived::Created);
                assert_eq!(archive.objects().await.len(), position + 4);
            }
            assert!(archive.read().await.unwrap() == archive.raw);
        }
    }
}

proptest! {
    #[test]
    fn any_section_of_parts_is_read_or_refused(bytes: Vec<u8>, cut in 0usize..80, flip: (usize, u8)) {
        let _ = decode(WireReader::new(&bytes));
        let parts = Parts { salt: [1, 2, 3, 4], stored: vec![(9, Digest([7; 32])), (1 << 20, Digest([8; 32]))] };
        let mut whole = encode(&parts).finish();
        prop_assert_eq!(decode(WireReader::new(&whole)).unwrap(), parts);
        let at = flip.0 % whole.len();
        whole[at] ^= flip.1;
        let _ = decode(WireReader::new(&whole));
        whole.truncate(cut);
        let _ = decode(WireReader::new(&whole));
    }
}
