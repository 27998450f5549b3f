//! Tests of trying again: what is repeated, what is not, and what a lost answer comes to.
//!
//! The store below fails by rules (`fault`), and a record between the two counts the attempts.

use super::super::conformance;
use super::super::error::{ErrorKind, Source};
use super::super::fault::{Fault, Faulty, Rule};
use super::super::memory::MemoryStore;
use super::super::record::Recording;
use super::super::refusal::Unheard;
use super::*;
use crate::clock::{ManualClock, SystemClock};

type Chain = Retrying<Recording<Faulty<MemoryStore>>>;

/// Retries over a record of the attempts over the faults over the objects.
fn chain() -> (Chain, Recording<Faulty<MemoryStore>>) {
    let recording = Recording::new(Faulty::new(MemoryStore::new()));
    (Retrying::new(recording.clone(), impatient(5), Arc::new(SystemClock), 1), recording)
}

/// Options whose pauses cost a test no time.
fn impatient(attempts_max: u32) -> RetryOptions {
    RetryOptions {
        attempts_max,
        pause_first: Duration::from_micros(1),
        pause_max: Duration::from_micros(10),
        ..RetryOptions::default()
    }
}

fn key() -> ObjectKey {
    ObjectKey::parse("site/object").unwrap()
}

fn body() -> Bytes {
    Bytes::from_static(b"sealed once")
}

#[tokio::test]
async fn keeps_the_contract() {
    let (store, _) = chain();
    conformance::check(Arc::new(store), "conformance").await;
}

#[tokio::test]
async fn keeps_the_contract_on_a_bad_network() {
    for seed in 0..3 {
        let faulty = Faulty::seeded(MemoryStore::new(), seed, 0.3);
        let store = Retrying::new(faulty.clone(), impatient(24), Arc::new(SystemClock), seed);
        conformance::check(Arc::new(store), "conformance").await;
        assert!(faulty.faults() > 100);
    }
}

#[tokio::test]
async fn a_read_is_repeated_until_it_succeeds() {
    let (store, record) = chain();
    store.create(&key(), body()).await.unwrap();
    record.inner().inject(Rule::on(Verb::Get, Fault::Before(ErrorKind::Unreachable)).times(3));
    assert_eq!(store.get(&key(), 100).await.unwrap(), body());
    assert_eq!(record.count(Verb::Get), 4);
}

#[tokio::test]
async fn what_will_not_change_is_not_repeated() {
    for kind in [
        ErrorKind::NotFound,
        ErrorKind::Denied,
        ErrorKind::Truncated,
        ErrorKind::TooLarge,
        ErrorKind::Full,
        ErrorKind::Invalid,
        ErrorKind::Other,
    ] {
        let (store, record) = chain();
        record.inner().inject(Rule::always(Fault::Before(kind)));
        assert_eq!(store.get(&key(), 100).await.unwrap_err().kind(), kind);
        assert_eq!(store.create(&key(), body()).await.unwrap_err().kind(), kind);
        assert_eq!(store.delete(&key()).await.unwrap_err().kind(), kind);
        assert_eq!(record.calls().len(), 3, "{kind:?}");
    }
}

#[tokio::test]
async fn attempts_are_bounded_and_told() {
    let (store, record) = chain();
    record.inner().inject(Rule::always(Fault::Before(ErrorKind::Unreachable)));
    let error = store.head(&key()).await.unwrap_err();
    assert_eq!(record.count(Verb::Head), 5);
    assert_eq!(
        error.to_string(),
        "could not look up site/object: the store did not answer: given up after 5 attempts"
    );
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "injected fault");
    let error = store.create(&key(), body()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unreachable, "nothing was ever sent");
}

/// Failure 39.
#[tokio::test]
async fn a_store_that_never_answers_ends_by_the_deadline() {
    let faulty = Faulty::new(MemoryStore::new());
    faulty.inject(Rule::on(Verb::Create, Fault::HangAfter));
    faulty.inject(Rule::always(Fault::HangBefore));
    let options = RetryOptions { deadline: Duration::from_millis(20), ..RetryOptions::default() };
    let store = Retrying::new(faulty.clone(), options, Arc::new(SystemClock), 1);
    assert_eq!(store.head(&key()).await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert_eq!(store.get_range(&key(), 0..9).await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert_eq!(store.delete(&key()).await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert_eq!(store.create(&key(), body()).await.unwrap_err().kind(), ErrorKind::OutcomeUnknown);
    assert_eq!(faulty.faults(), 4, "no attempt begins after the deadline");
}

#[test]
fn the_deadline_grows_with_what_is_carried() {
    let clock = ManualClock::new(jiff::Timestamp::UNIX_EPOCH);
    let options = RetryOptions::default();
    let store = Retrying::new(MemoryStore::new(), options, Arc::new(clock), 1);
    let patience = |bytes| store.begin(Verb::Create, "a", bytes).remaining() - options.deadline;
    assert_eq!(patience(0), Duration::ZERO);
    assert_eq!(patience(32 << 20), Duration::from_secs(512));
    assert_eq!(patience(u64::MAX), Duration::from_secs(1024), "not even a damaged length makes it for ever");
}

/// A silent store is given up when the option says so; a line that breaks in mid-transfer has the time its bytes take.
#[tokio::test]
async fn only_what_may_have_carried_bytes_takes_the_time_for_them() {
    let unreachable = |source: Option<Source>| Error::Unreachable {
        verb: Verb::Get,
        key: "a".to_owned(),
        reason: None,
        source,
    };
    let silent = unreachable(Some(Arc::new(Unheard("no answer".to_owned()))));
    for (error, seconds_left) in [(silent, 0), (unreachable(None), 120)] {
        let clock = ManualClock::new(jiff::Timestamp::UNIX_EPOCH);
        let shared = Arc::new(clock.clone());
        let store = Retrying::new(MemoryStore::new(), RetryOptions::default(), shared, 1);
        let mut round = store.begin(Verb::Get, "a", 32 << 20);
        assert_eq!(round.remaining_to_begin(), Duration::from_secs(120));
        let failed = async {
            clock.advance(Duration::from_secs(300));
            Err::<(), _>(error)
        };
        let error = round.attempt(failed).await.unwrap_err();
        assert_eq!(round.remaining_to_begin(), Duration::from_secs(seconds_left), "{error:?}");
        // What is under way may take as long as ever.
        assert_eq!(round.remaining(), Duration::from_secs(120 + 512 - 300), "{error:?}");
    }
}

#[test]
fn pauses_double_up_to_a_bound_and_are_spread_over_half_of_it() {
    let options = RetryOptions::default();
    let pauses =
        |fraction: f64| [1, 2, 3, 7, 8, 40, u32::MAX].map(|attempts| options.pause(attempts, fraction));
    let longest = [100, 200, 400, 6400, 10_000, 10_000, 10_000].map(Duration::from_millis);
    assert_eq!(pauses(1.0), longest);
    assert_eq!(pauses(0.0), longest.map(|pause| pause / 2));
}

/// Failure 43: the answer to the first attempt was lost, the second finds the key taken.
#[tokio::test]
async fn a_lost_answer_is_not_a_conflict() {
    let (store, record) = chain();
    record.inner().inject(Rule::on(Verb::Create, Fault::After(ErrorKind::OutcomeUnknown)).times(1));
    store.create(&key(), body()).await.unwrap();
    assert_eq!((record.count(Verb::Create), record.count(Verb::Get)), (2, 1));
    assert_eq!(store.get(&key(), 100).await.unwrap(), body());
}

#[tokio::test]
async fn a_lost_request_is_sent_again() {
    let (store, record) = chain();
    record.inner().inject(Rule::on(Verb::Create, Fault::Before(ErrorKind::OutcomeUnknown)).times(2));
    store.create(&key(), body()).await.unwrap();
    assert_eq!((record.count(Verb::Create), record.count(Verb::Get)), (3, 0));
}

#[tokio::test]
async fn taken_at_the_first_attempt_is_a_conflict_even_with_our_bytes() {
    let (store, record) = chain();
    record.inner().create(&key(), body()).await.unwrap();
    let error = store.create(&key(), body()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(record.count(Verb::Get), 0);
}

#[tokio::test]
async fn taken_by_somebody_else_after_a_lost_request_is_a_conflict() {
    for other in [&b"not ours"[..], b"something longer than what we wanted to put there"] {
        let (store, record) = chain();
        record.inner().inner().create(&key(), Bytes::from_static(other)).await.unwrap();
        record.inner().inject(Rule::on(Verb::Create, Fault::Before(ErrorKind::OutcomeUnknown)).times(1));
        let error = store.create(&key(), body()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        assert_eq!(record.inner().inner().get(&key(), 100).await.unwrap(), other);
    }
}

#[tokio::test]
async fn an_outcome_that_cannot_be_learnt_stays_unknown() {
    // Created, but neither the answer nor the object can be read.
    let (store, record) = chain();
    record.inner().inject(Rule::on(Verb::Create, Fault::After(ErrorKind::OutcomeUnknown)).times(1));
    record.inner().inject(Rule::on(Verb::Get, Fault::Before(ErrorKind::Unreachable)));
    assert_eq!(store.create(&key(), body()).await.unwrap_err().kind(), ErrorKind::OutcomeUnknown);

    // Perhaps created, then the credentials were withdrawn: a plain refusal would claim that nothing is
    // there.
    let (store, record) = chain();
    record.inner().inject(Rule::on(Verb::Create, Fault::After(ErrorKind::OutcomeUnknown)).times(1));
    record.inner().inject(Rule::on(Verb::Create, Fault::Before(ErrorKind::Denied)));
    assert_eq!(store.create(&key(), body()).await.unwrap_err().kind(), ErrorKind::OutcomeUnknown);

    // Perhaps created, then the store went away.
    let (store, record) = chain();
    record.inner().inject(Rule::on(Verb::Create, Fault::After(ErrorKind::OutcomeUnknown)).times(1));
    record.inner().inject(Rule::on(Verb::Create, Fault::Before(ErrorKind::Unreachable)));
    assert_eq!(store.create(&key(), body()).await.unwrap_err().kind(), ErrorKind::OutcomeUnknown);
}

/// A key that is taken but not there yet: some stores refuse while another create is under way.
#[tokio::test]
async fn a_create_that_loses_to_one_that_is_never_finished_is_repeated() {
    let (store, record) = chain();
    record.inner().inject(Rule::on(Verb::Create, Fault::Before(ErrorKind::OutcomeUnknown)).times(1));
    record.inner().inject(Rule::on(Verb::Create, Fault::Before(ErrorKind::AlreadyExists)).times(1));
    store.create(&key(), body()).await.unwrap();
    assert_eq!((record.count(Verb::Create), record.count(Verb::Get)), (3, 1));
}
