//! One request of the store that fails, at each position of an undisturbed run: of archiving a segment and writing a
//! basebackup, and of reading both back. The run is right or fails and names what; the next run converges.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use walden::catalog::basebackups;
use walden::clock::SystemClock;
use walden::codec::{Compression, NewKeys, SeededRandom, create_keys};
use walden::repo::builder::BasebackupBuilder;
use walden::repo::entry::TreePath;
use walden::repo::layout::WalObjectName;
use walden::repo::wal_object::{Replace, WalKey, archive_wal, read_wal, supersede_wal};
use walden::repo::{Basebackup, ClusterId, Error, FileReader, Repository, RepositoryOptions};
use walden::storage::{
    Call, ErrorKind, Fault, Faulty, MemoryStore, ObjectKey, Recording, RetryOptions, Retrying, Rule, Store,
    Verb,
};

use crate::support::repository::{basebackup, clock, keyring, site_options};

/// Keys of the site, and a file and a segment of it.
pub struct Scene {
    keys: NewKeys,
    file: Vec<u8>,
    pub segment: Vec<u8>,
}

pub type TestStore = Arc<Faulty<Arc<MemoryStore>>>;

const FILE: &str = "data/base/5/1259";

impl Scene {
    pub fn new() -> Self {
        let noise =
            |len: u64| (0..len).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect();
        Self { keys: create_keys(3072).unwrap(), file: noise(200_000), segment: noise(300_000) }
    }

    pub fn cluster() -> ClusterId {
        "7301234567890123456-16".parse().unwrap()
    }

    pub fn name() -> WalObjectName {
        WalObjectName::Segment("000000010000000000000002".parse().unwrap())
    }

    pub fn options(&self, store: Arc<dyn Store>, seed: u64) -> RepositoryOptions {
        site_options(store, keyring(&self.keys, SeededRandom::new(seed)), clock())
    }

    /// Archives the segment and writes a basebackup, in a site that is created where it is missing.
    async fn write(&self, store: Arc<dyn Store>, seed: u64) -> Result<(), Error> {
        let (repository, _) = Repository::open_or_create(self.options(store, seed)).await?;
        let key = WalKey::create(repository.keyring())?;
        let zstd = Compression::zstd(1);
        archive_wal(&repository, Self::cluster(), Self::name(), &self.segment, &key, zstd).await?;
        let mut builder = BasebackupBuilder::begin(&repository, basebackup(zstd), None).await?;
        builder.directory("data").directory("data/base").directory("data/base/5");
        builder.file(FILE, &self.file).await?;
        builder.finish().await?;
        Ok(())
    }

    /// Archives another segment in the place of the one that stands there.
    async fn force(&self, store: Arc<dyn Store>, seed: u64, segment: &[u8]) -> Result<(), Error> {
        let repository = Repository::open(self.options(store, seed)).await?;
        let key = WalKey::create(repository.keyring())?;
        let WalObjectName::Segment(name) = Self::name() else { unreachable!("it is a segment") };
        let (segment, zstd) = (segment.to_vec().into(), Compression::zstd(1));
        supersede_wal(&repository, Self::cluster(), name, Replace::Anything, &segment, &key, zstd).await?;
        Ok(())
    }

    pub async fn read_segment(&self, store: Arc<dyn Store>) -> Result<Vec<u8>, Error> {
        let repository = Repository::open(self.options(store, 99)).await?;
        Ok(read_wal(&repository, Self::cluster(), Self::name()).await?.to_vec())
    }

    /// Reads every basebackup that is listed, and the segment; returns how many of each there were.
    async fn read(&self, store: Arc<dyn Store>) -> Result<(usize, usize), Error> {
        let repository = match Repository::open(self.options(store, 99)).await {
            Err(error) if error.is_absent() => return Ok((0, 0)),
            other => other?,
        };
        let listed = basebackups::list(&repository).await?;
        if let Some((_, error)) = listed.unreadable.into_iter().next() {
            return Err(error);
        }
        for basebackup in &listed.complete {
            let opened = Basebackup::open(&repository, basebackup.record.id).await?;
            let reader = FileReader::new(Arc::new(opened), 1 << 20);
            let entry = reader.basebackup().entry(&TreePath::new(FILE).unwrap()).await?;
            let (_, entry) = entry.expect("a basebackup that is listed has its file");
            assert!(
                reader.read(&entry, 0..entry.size()).await?.deref() == self.file,
                "wrong bytes of the file"
            );
        }
        let segments = match read_wal(&repository, Self::cluster(), Self::name()).await {
            Ok(segment) => {
                assert!(segment.deref() == self.segment, "wrong bytes of the segment");
                1
            }
            Err(error) if error.is_absent() => 0,
            Err(error) => return Err(error),
        };
        Ok((listed.complete.len(), segments))
    }
}

pub fn faulty() -> TestStore {
    Arc::new(Faulty::new(Arc::default()))
}

/// The faults that a call may meet: no effect, an effect without an answer, a body cut or changed on its way.
pub fn faults(call: &Call) -> Vec<Fault> {
    let lost = if call.verb == Verb::Create { ErrorKind::OutcomeUnknown } else { ErrorKind::Unreachable };
    let mut faults = vec![Fault::Before(ErrorKind::Unreachable), Fault::Before(lost), Fault::After(lost)];
    if matches!(call.verb, Verb::Get | Verb::GetRange) {
        faults
            .extend([Fault::TruncateBody(call.bytes as usize / 2), Fault::FlipByte(call.bytes as usize / 2)]);
    }
    faults
}

pub fn lies(fault: &Fault) -> bool {
    matches!(fault, Fault::TruncateBody(_) | Fault::FlipByte(_))
}

pub fn retrying(store: TestStore) -> Arc<dyn Store> {
    let pause = Duration::from_millis(1);
    let options = RetryOptions { pause_first: pause, pause_max: pause, ..RetryOptions::default() };
    Arc::new(Retrying::new(store, options, Arc::new(SystemClock), 1))
}

/// Says whether an error tells which object or folder it is about, or what the store was found to lack.
pub fn names_what(error: &Error) -> bool {
    let text = error.to_string();
    let named = ["main/", "of basebackup ", "WAL file "].iter().any(|name| text.contains(name));
    named || matches!(error, Error::UnsuitableStore { .. })
}

#[tokio::test]
async fn writing_survives_a_fault_at_every_position_or_fails_and_names_what() {
    let scene = Scene::new();
    let log = Recording::new(MemoryStore::new());
    scene.write(Arc::new(log.clone()), 1).await.unwrap();
    let calls = log.calls();
    assert!(calls.iter().filter(|call| call.verb == Verb::Create).count() >= 7, "{calls:#?}");
    for (position, call) in calls.iter().enumerate() {
        for (fault, retries) in faults(call).iter().flat_map(|fault| [(fault, false), (fault, true)]) {
            let what =
                format!("{fault:?} at call {position}, {:?} of {}, retried: {retries}", call.verb, call.key);
            let store = faulty();
            store.inject(Rule::always(fault.clone()).skip(position).times(1));
            let used = if retries { retrying(store.clone()) } else { store.clone() as Arc<dyn Store> };
            let outcome = scene.write(used, 1).await;
            assert_eq!(store.faults(), 1, "{what}");
            store.heal();
            let (basebackups, segments) =
                scene.read(store.clone()).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            match outcome {
                Ok(()) => assert_eq!((basebackups, segments), (1, 1), "{what}"),
                Err(error) => {
                    assert!(!retries || lies(fault), "{what}: {error}");
                    assert!(names_what(&error), "{what}: {error}");
                }
            }
            scene.write(store.clone(), 2).await.unwrap_or_else(|error| panic!("{what}, then: {error}"));
            let after = scene.read(store.clone()).await.unwrap();
            assert_eq!(after, (basebackups + 1, 1), "{what}");
        }
    }
}

#[tokio::test]
async fn reading_with_a_fault_at_every_position_is_right_or_fails_and_names_what() {
    let scene = Scene::new();
    let memory = Arc::new(MemoryStore::new());
    scene.write(memory.clone(), 1).await.unwrap();
    let log = Recording::new(memory.clone());
    assert_eq!(scene.read(Arc::new(log.clone())).await.unwrap(), (1, 1));
    for (position, call) in log.calls().iter().enumerate() {
        for (fault, retries) in faults(call).iter().flat_map(|fault| [(fault, false), (fault, true)]) {
            let what =
                format!("{fault:?} at call {position}, {:?} of {}, retried: {retries}", call.verb, call.key);
            let store: TestStore = Arc::new(Faulty::new(memory.clone()));
            store.inject(Rule::always(fault.clone()).skip(position).times(1));
            let used = if retries { retrying(store.clone()) } else { store.clone() as Arc<dyn Store> };
            match scene.read(used).await {
                Ok(found) => assert_eq!(found, (1, 1), "{what}"),
                Err(error) => {
                    assert!(!retries || lies(fault), "{what}: {error}");
                    assert!(names_what(&error), "{what}: {error}");
                }
            }
            assert_eq!(store.faults(), 1, "{what}");
        }
    }
}

/// What is forced counts when that was said, and until then what it was to replace.
#[tokio::test]
async fn forcing_a_segment_survives_a_fault_at_every_position_or_leaves_what_stood_there() {
    let scene = Scene::new();
    let memory = Arc::new(MemoryStore::new());
    scene.write(memory.clone(), 1).await.unwrap();
    let (first, second) = (vec![1; 200_000], vec![2; 200_000]);
    scene.force(memory.clone(), 2, &first).await.unwrap();
    let objects = objects(&memory).await;
    let log = Recording::new(copy_of(&objects).await);
    scene.force(Arc::new(log.clone()), 3, &second).await.unwrap();
    let calls = log.calls();
    assert!(calls.len() >= 5, "{calls:#?}");
    for (position, call) in calls.iter().enumerate() {
        for (fault, retries) in faults(call).iter().flat_map(|fault| [(fault, false), (fault, true)]) {
            let what =
                format!("{fault:?} at call {position}, {:?} of {}, retried: {retries}", call.verb, call.key);
            let store: TestStore = Arc::new(Faulty::new(Arc::new(copy_of(&objects).await)));
            store.inject(Rule::always(fault.clone()).skip(position).times(1));
            let used = if retries { retrying(store.clone()) } else { store.clone() as Arc<dyn Store> };
            let outcome = scene.force(used, 3, &second).await;
            assert_eq!(store.faults(), 1, "{what}");
            store.heal();
            let read =
                scene.read_segment(store.clone()).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            match outcome {
                Ok(()) => assert!(read == second, "{what}"),
                Err(error) => {
                    assert!(!retries || lies(fault), "{what}: {error}");
                    assert!(names_what(&error), "{what}: {error}");
                    assert!(read == first || read == second, "{what}");
                }
            }
            scene
                .force(store.clone(), 4, &second)
                .await
                .unwrap_or_else(|error| panic!("{what}, then: {error}"));
            assert!(scene.read_segment(store).await.unwrap() == second, "{what}");
        }
    }
}

async fn objects(store: &MemoryStore) -> Vec<(ObjectKey, bytes::Bytes)> {
    let mut objects = Vec::new();
    for object in store.list("", None, 1000).await.unwrap() {
        let content = store.get(&object.key, object.size).await.unwrap();
        objects.push((object.key, content));
    }
    objects
}

async fn copy_of(objects: &[(ObjectKey, bytes::Bytes)]) -> MemoryStore {
    let store = MemoryStore::new();
    for (key, content) in objects {
        store.create(key, content.clone()).await.unwrap();
    }
    store
}
