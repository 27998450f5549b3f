//! One request of the store that fails, at each position of a push of each kind of file: it is archived, or the push
//! fails and names what, and PostgreSQL's next one converges. With the layer that asks again every push succeeds.

use crate::storage::{Call, Recording, RetryOptions, Retrying, Store};

use super::*;

/// A file of each kind that PostgreSQL archives.
fn files() -> [(String, Vec<u8>); 4] {
    let label = b"START WAL LOCATION: 0/200028 (file 000000010000000000000002)\n";
    [
        (name(1, 2), segment(1, 2)),
        (format!("{}.partial", name(1, 3)), segment(1, 3)),
        ("00000002.history".to_owned(), b"1\t0/300100\tno recovery target specified\n".to_vec()),
        (format!("{}.00000028.backup", name(1, 2)), label.to_vec()),
    ]
}

/// The faults that a call may meet: no effect, an effect without an answer, a body cut or changed on its way.
fn faults(call: &Call) -> Vec<Fault> {
    let lost = if call.verb == Verb::Create { ErrorKind::OutcomeUnknown } else { ErrorKind::Unreachable };
    let mut faults = vec![Fault::Before(ErrorKind::Unreachable), Fault::Before(lost), Fault::After(lost)];
    if call.verb == Verb::Get {
        let half = call.bytes as usize / 2;
        faults.extend([Fault::TruncateBody(half), Fault::FlipByte(half)]);
    }
    faults
}

fn lies(fault: &Fault) -> bool {
    matches!(fault, Fault::TruncateBody(_) | Fault::FlipByte(_))
}

/// Says whether an error tells which object it is about, or what the store was found to lack.
fn names_what(error: &Error) -> bool {
    let text = error.to_string();
    let lacks = matches!(error, Error::Repository(repo::Error::UnsuitableStore { .. }));
    lacks || text.contains("main/") || text.contains("WAL file ")
}

fn retrying(store: Arc<dyn Store>) -> Arc<dyn Store> {
    let pause = Duration::from_millis(1);
    let options = RetryOptions { pause_first: pause, pause_max: pause, ..RetryOptions::default() };
    Arc::new(Retrying::new(store, options, Arc::new(SystemClock), 1))
}

impl Server {
    /// Pushes a file through a store as `walden wal push` does, in a site that is created where it is missing; each process
    /// draws numbers of its own.
    async fn push_through(&self, store: Arc<dyn Store>, name: &str, seed: u64) -> Result<Archived, Error> {
        let file = check_file(&self.path("pg_wal").join(name))?;
        let options = testing::options(store, testing::clock(), seed);
        let (repository, _) = Repository::open_or_create(options).await?;
        push(&repository, &file, Compression::zstd(1), OnConflict::Refuse).await
    }

    /// Checks that the archive has the file, and has it right.
    async fn assert_archived(&self, name: &str, content: &[u8], what: &str) {
        // No recovery is planned where there is no segment.
        self.push_segments(1, [1]).await;
        assert_eq!(self.fetch(name).await.unwrap(), Fetched::Restored, "{what}");
        assert!(self.fetched() == content, "{what}: other bytes");
    }
}

#[tokio::test]
async fn a_push_survives_a_fault_at_every_position_or_fails_and_the_next_converges() {
    for (file, content) in files() {
        let undisturbed = Server::new();
        undisturbed.write_wal(&file, &content);
        let log = Recording::new(MemoryStore::new());
        undisturbed.push_through(Arc::new(log.clone()), &file, 1).await.unwrap();
        let calls = log.calls();
        assert!(calls.iter().filter(|call| call.verb == Verb::Create).count() >= 2, "{calls:#?}");
        let mut failures = 0;
        for (position, call) in calls.iter().enumerate() {
            for (fault, retried) in faults(call).iter().flat_map(|fault| [(fault, false), (fault, true)]) {
                let what = format!(
                    "{file}: {fault:?} at call {position}, {:?} of {}, retried: {retried}",
                    call.verb, call.key
                );
                let server = Server::new();
                server.write_wal(&file, &content);
                let plain: Arc<dyn Store> = Arc::new(server.store.clone());
                let used = if retried { retrying(plain.clone()) } else { plain.clone() };
                server.store.inject(Rule::always(fault.clone()).skip(position).times(1));
                let outcome = server.push_through(used, &file, 1).await;
                assert_eq!(server.store.faults(), 1, "{what}");
                server.store.heal();
                let archived = outcome.is_ok();
                if let Err(error) = outcome {
                    failures += 1;
                    assert!(!retried || lies(fault), "{what}: {error}");
                    assert!(names_what(&error), "{what}: {error}");
                }
                let next = server.push_through(plain, &file, 2).await;
                let next = next.unwrap_or_else(|error| panic!("{what}, then: {error}"));
                assert!(!archived || next == Archived::Identical, "{what}: it was said to be archived");
                // The stored file was compared just now, by its digests; what a server gets of it is the same in both rounds.
                if !retried {
                    server.assert_archived(&file, &content, &what).await;
                }
            }
        }
        assert!(failures > 0, "{file}: no fault failed a push");
    }
}
