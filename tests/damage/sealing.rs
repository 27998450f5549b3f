//! No key and nonce ever carry two plaintexts, whatever fails on the way and however often it is tried again
//! (failure 43).
//!
//! A witness sees every sealing while the store fails at each call in turn, before or after its effect. What failed
//! is then done again: by the same process, and by one that was started anew.

use std::sync::Arc;
use std::time::Duration;

use walden::clock::SystemClock;
use walden::codec::{Compression, NewKeys, SealRecorder, SystemRandom, create_keys};
use walden::pg::{Lsn, TimelineId};
use walden::repo::builder::{BasebackupBuilder, BuilderOptions};
use walden::repo::entry::TreePath;
use walden::repo::layout::WalObjectName;
use walden::repo::wal_object::{
    Archived, HistoryBranch, WalKey, archive_history, archive_wal, read_history, read_wal,
};
use walden::repo::{Basebackup, BasebackupId, Error, FileReader, Repository};
use walden::storage::{ErrorKind, Fault, Faulty, MemoryStore, RetryOptions, Retrying, Rule, Store};

use crate::support::repository::{basebackup, clock, keyring, site_options};

/// A store that fails at one call, the keys, and the witness.
struct Witness {
    recorder: Arc<SealRecorder>,
    keys: NewKeys,
    memory: MemoryStore,
}

/// Who does again what failed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Again {
    SameProcess,
    NewProcess,
}

const FAULTS: [Fault; 2] = [Fault::Before(ErrorKind::Unreachable), Fault::After(ErrorKind::OutcomeUnknown)];
/// More calls than any of the writes makes: a loop that gets here does not end by itself.
const CALLS_MAX: usize = 60;

impl Witness {
    fn new() -> Self {
        let recorder = Arc::new(SealRecorder::new());
        Self { recorder, keys: create_keys(3072).unwrap(), memory: MemoryStore::new() }
    }

    /// Starts a process: its own keyring, drawn from the system's randomness as in earnest.
    async fn process(&self, store: Arc<dyn Store>) -> Repository {
        let keyring = keyring(&self.keys, SystemRandom).observed_by(self.recorder.clone());
        Repository::open_or_create(site_options(store, keyring, clock())).await.unwrap().0
    }

    fn assert_no_nonce_was_used_twice(&self) {
        assert!(self.recorder.sealed_count() > 100, "the witness was told of too little");
        assert_eq!(self.recorder.reused_nonces(), []);
    }
}

/// Fails each call in turn in each way, and has `work` done again, until `work` makes no more calls.
///
/// `work` gets the repository and the number of the round, and what it writes is new in every round.
async fn fail_everywhere<W>(witness: &Witness, again: Again, retrying: bool, work: W)
where
    W: AsyncFn(&Repository, usize) -> Result<(), Error>,
{
    let mut round = 0;
    for fault in FAULTS {
        for position in 0.. {
            assert!(position < CALLS_MAX, "the writer never stops calling the store");
            round += 1;
            let faulty = Faulty::new(witness.memory.clone());
            let store: Arc<dyn Store> = if retrying {
                let pause = Duration::from_millis(1);
                let options =
                    RetryOptions { pause_first: pause, pause_max: pause, ..RetryOptions::default() };
                Arc::new(Retrying::new(faulty.clone(), options, Arc::new(SystemClock), 1))
            } else {
                Arc::new(faulty.clone())
            };
            let process = witness.process(store.clone()).await;
            faulty.inject(Rule::always(fault.clone()).skip(position).times(1));
            let first = work(&process, round).await;
            if faulty.faults() == 0 {
                first.unwrap();
                break;
            }
            assert!(first.is_ok() || !retrying, "a store that fails once is tried again: {first:?}");
            let process = if again == Again::SameProcess { process } else { witness.process(store).await };
            work(&process, round).await.unwrap_or_else(|error| panic!("{fault:?} at {position}: {error}"));
        }
    }
}

fn options() -> BuilderOptions {
    basebackup(Compression::zstd(1))
}

/// Bytes that are others in every round.
fn content(round: usize, len: usize) -> Vec<u8> {
    (0..len).map(|n| (n / 5) as u8 ^ (n / 8192) as u8 ^ round as u8).collect()
}

/// Writes a basebackup and one that names its chunks, and reads both.
async fn back_up(repository: &Repository, round: usize) -> Result<(), Error> {
    let full = content(round, 20 * 8192);
    let first = write(repository, None, &full).await?;
    assert_eq!(read(repository, first).await?, full);
    let parent = Arc::new(Basebackup::open(repository, first).await?);
    let mut changed = full.clone();
    changed[9 * 8192] ^= 1;
    let second = write(repository, Some(parent), &changed).await?;
    assert_eq!(read(repository, second).await?, changed);
    Ok(())
}

async fn write(
    repository: &Repository,
    parent: Option<Arc<Basebackup>>,
    relation: &[u8],
) -> Result<BasebackupId, Error> {
    let mut builder = BasebackupBuilder::begin(repository, options(), parent).await?;
    builder.directory("data").directory("data/base").directory("data/base/5");
    builder.file("data/PG_VERSION", b"15\n").await?;
    builder.file("data/postgresql.conf", &relation[..3000]).await?;
    builder.file("data/base/5/16384", relation).await?;
    Ok(builder.finish().await?.id)
}

async fn read(repository: &Repository, id: BasebackupId) -> Result<Vec<u8>, Error> {
    let reader = FileReader::new(Arc::new(Basebackup::open(repository, id).await?), 1 << 20);
    let path = TreePath::new("data/base/5/16384").unwrap();
    let (_, entry) = reader.basebackup().entry(&path).await?.unwrap();
    Ok(reader.read(&entry, 0..entry.size()).await?.to_vec())
}

#[tokio::test]
async fn no_failed_or_repeated_basebackup_uses_a_nonce_twice() {
    let witness = Witness::new();
    for again in [Again::SameProcess, Again::NewProcess] {
        for retrying in [false, true] {
            fail_everywhere(&witness, again, retrying, back_up).await;
        }
    }
    witness.assert_no_nonce_was_used_twice();
}

#[tokio::test]
async fn no_failed_or_repeated_push_uses_a_nonce_twice() {
    let witness = Witness::new();
    for (n, (again, retrying)) in [
        (Again::SameProcess, false),
        (Again::SameProcess, true),
        (Again::NewProcess, false),
        (Again::NewProcess, true),
    ]
    .into_iter()
    .enumerate()
    {
        // One key of the process serves every push, as it does in a daemon.
        let kept = witness.process(Arc::new(witness.memory.clone())).await;
        let kept = WalKey::create(kept.keyring()).unwrap();
        let cluster = "7301234567890123456-16".parse().unwrap();
        fail_everywhere(&witness, again, retrying, async |repository, round| {
            let key = if again == Again::SameProcess {
                kept.clone()
            } else {
                WalKey::create(repository.keyring())?
            };
            let name = format!("00000001{n:08X}{round:08X}").parse().unwrap();
            let name = WalObjectName::Segment(name);
            let segment = content(round, 300_000);
            let zstd = Compression::zstd(1);
            archive_wal(repository, cluster, name, &segment, &key, zstd).await?;
            assert_eq!(read_wal(repository, cluster, name).await?, segment);
            // What is refused is sealed first, and under the same name.
            let other = content(round + 1, 300_000);
            let refused = archive_wal(repository, cluster, name, &other, &key, zstd).await;
            match refused {
                Err(Error::Different { .. }) => {}
                Err(error) => return Err(error),
                Ok(archived) => panic!("another segment under the name was taken: {archived:?}"),
            }
            let timeline = TimelineId::new((n * 1000 + round + 1) as u32).unwrap();
            let branch = HistoryBranch { parent: TimelineId::FIRST, switch: Lsn(0x0200_0000) };
            let history = format!("1\t0/2000000\tround {round}\n");
            archive_history(repository, cluster, timeline, branch, history.as_bytes(), &key).await?;
            let again =
                archive_history(repository, cluster, timeline, branch, history.as_bytes(), &key).await?;
            assert_eq!(again, Archived::Identical);
            assert_eq!(read_history(repository, cluster, timeline).await?, history.as_bytes());
            Ok(())
        })
        .await;
    }
    witness.assert_no_nonce_was_used_twice();
}
