//! How long a mount waits for a store that does not answer.
//!
//! The answer changes during a mount's life: recovery waits for ever, because an error would end it; a server
//! that takes queries waits until a deadline; a stop waits a moment. `PatienceSwitch` holds the answer of the moment
//! and `PatientLower` applies it in front of any lower, so that neither the tree nor the upper knows about retries.
//! The deadline counts from the first attempt and cuts off the one under way: the store has patience of its own.
//! Only errors that waiting can cure are retried; damage is reported at once. A fetch is repeated for what of it has
//! not come yet. One that nobody waits for is not repeated at all: it would keep others from what it has claimed, and
//! who comes to wait for the same brings a patience that counts from then.

use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::clock::Clock;
use crate::mount::lower::{Child, Lower, LowerError, Node, NodeId, Piece, PieceSink};
use crate::repo::Urgency;

/// The pause after the first failure; it doubles up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(200);

/// The longest pause between two attempts: a store that comes back is noticed this fast.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long to wait for a store that does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Keep trying for this long.
    Deadline(Duration),
    /// Keep trying until the switch says otherwise.
    Forever,
}

/// The patience of the moment, shared by everyone who waits.
#[derive(Debug)]
pub struct PatienceSwitch {
    current: watch::Sender<Patience>,
}

impl PatienceSwitch {
    /// Creates a switch that stands at `patience`.
    pub fn new(patience: Patience) -> Arc<Self> {
        Arc::new(Self { current: watch::Sender::new(patience) })
    }

    /// Changes the patience, also of those who are waiting already.
    pub fn set(&self, patience: Patience) {
        self.current.send_replace(patience);
    }
}

/// A lower that repeats what failed for want of a store.
#[derive(Debug)]
pub struct PatientLower {
    inner: Arc<dyn Lower>,
    switch: Arc<PatienceSwitch>,
    clock: Arc<dyn Clock>,
    pause_first: Duration,
}

impl PatientLower {
    /// Wraps a lower.
    pub fn new(inner: Arc<dyn Lower>, switch: Arc<PatienceSwitch>, clock: Arc<dyn Clock>) -> Self {
        Self { inner, switch, clock, pause_first: PAUSE_FIRST }
    }

    async fn repeat<T, F>(&self, node: NodeId, call: impl Fn() -> F) -> Result<T, LowerError>
    where
        F: Future<Output = Result<T, LowerError>>,
    {
        let begun = self.clock.monotonic();
        let mut over = std::pin::pin!(self.run_out(begun));
        let mut pause = self.pause_first;
        let mut last = LowerError::Unreachable {
            object: format!("of {node:?}"),
            detail: "the store did not answer in time".to_owned(),
        };
        loop {
            // In this order: whoever has no time left still gets what is at hand.
            tokio::select! {
                biased;
                outcome = call() => match outcome {
                    Err(error) if error.is_transient() => last = error,
                    outcome => return outcome,
                },
                () = &mut over => return Err(last),
            }
            let waited = self.clock.monotonic().saturating_duration_since(begun);
            tracing::warn!(waited_seconds = waited.as_secs(), "waiting for the store: {last}");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = &mut over => return Err(last),
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Resolves when the patience of the moment is over for what began at `begun`.
    async fn run_out(&self, begun: Instant) {
        let mut patience = self.switch.current.subscribe();
        loop {
            let current = *patience.borrow_and_update();
            // The sender lives in `self`, so `changed` cannot fail.
            let _ = match current {
                Patience::Forever => patience.changed().await.is_ok(),
                Patience::Deadline(deadline) => {
                    let waited = self.clock.monotonic().saturating_duration_since(begun);
                    let Some(left) = deadline.checked_sub(waited).filter(|left| !left.is_zero()) else {
                        return;
                    };
                    tokio::time::timeout(left.min(self.pause_first), patience.changed()).await.is_ok()
                }
            };
        }
    }
}

#[async_trait::async_trait]
impl Lower for PatientLower {
    fn root(&self) -> NodeId {
        self.inner.root()
    }

    async fn node(&self, node: NodeId) -> Result<Node, LowerError> {
        self.repeat(node, || self.inner.node(node)).await
    }

    async fn lookup(&self, directory: NodeId, name: &[u8]) -> Result<Option<(NodeId, Node)>, LowerError> {
        self.repeat(directory, || self.inner.lookup(directory, name)).await
    }

    async fn list(&self, directory: NodeId) -> Result<Vec<Child>, LowerError> {
        self.repeat(directory, || self.inner.list(directory)).await
    }

    async fn read_link(&self, node: NodeId) -> Result<Vec<u8>, LowerError> {
        self.repeat(node, || self.inner.read_link(node)).await
    }

    async fn fetch_each(
        &self,
        node: NodeId,
        ranges: &[Range<u64>],
        urgency: Urgency,
        sink: &dyn PieceSink,
    ) -> Result<(), LowerError> {
        if urgency < Urgency::Foreground {
            return self.inner.fetch_each(node, ranges, urgency, sink).await;
        }
        let rest = Remainder { sink, left: Mutex::new(ranges.to_vec()) };
        let rest = &rest;
        let attempt = move || {
            let left = rest.left().clone();
            async move { self.inner.fetch_each(node, &left, urgency, rest).await }
        };
        self.repeat(node, attempt).await
    }
}

/// Hands pieces on and remembers what has not come yet.
struct Remainder<'a> {
    sink: &'a dyn PieceSink,
    left: Mutex<Vec<Range<u64>>>,
}

impl Remainder<'_> {
    fn left(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.left.lock().expect("no holder of this lock panics")
    }
}

impl PieceSink for Remainder<'_> {
    fn take(&self, pieces: Vec<Piece>) -> ControlFlow<()> {
        {
            let mut left = self.left();
            for piece in &pieces {
                *left = without(&left, &piece.range());
            }
        }
        self.sink.take(pieces)
    }
}

/// Takes a range out of ranges that ascend.
fn without(ranges: &[Range<u64>], taken: &Range<u64>) -> Vec<Range<u64>> {
    let parts = |range: &Range<u64>| {
        let before = range.start..range.end.min(taken.start);
        let after = range.start.max(taken.end)..range.end;
        if taken.is_empty() { [range.clone(), 0..0] } else { [before, after] }
    };
    ranges.iter().flat_map(parts).filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{ManualClock, SystemClock};
    use crate::mount::memory_lower::{MemoryLower, PIECE};

    fn lower() -> (Arc<MemoryLower>, NodeId) {
        let lower = MemoryLower::build(&[("f", 8192)]);
        let node = lower.at("f");
        (Arc::new(lower), node)
    }

    fn patient(
        inner: &Arc<MemoryLower>,
        switch: &Arc<PatienceSwitch>,
        clock: Arc<dyn Clock>,
    ) -> Arc<PatientLower> {
        let mut patient = PatientLower::new(inner.clone(), switch.clone(), clock);
        patient.pause_first = Duration::from_micros(10);
        Arc::new(patient)
    }

    /// Waits until the lower was asked this often: retries go on.
    async fn asked(inner: &MemoryLower, times: u64) {
        while inner.fetches() < times {
            tokio::time::sleep(Duration::from_micros(10)).await;
        }
    }

    #[tokio::test]
    async fn a_store_that_comes_back_is_waited_for() {
        let (inner, node) = lower();
        inner.fail_next_fetches(5);
        let patient = patient(&inner, &PatienceSwitch::new(Patience::Forever), Arc::new(SystemClock));
        assert_eq!(patient.fetch(node, 0..1).await.unwrap().len(), 1);
        assert_eq!(inner.fetches(), 6);
    }

    #[tokio::test]
    async fn a_shorter_deadline_ends_a_wait_under_way() {
        let (inner, node) = lower();
        inner.fail_next_fetches(u32::MAX);
        let switch = PatienceSwitch::new(Patience::Forever);
        let patient = patient(&inner, &switch, Arc::new(SystemClock));
        let waiting = tokio::spawn(async move { patient.fetch(node, 0..1).await });
        asked(&inner, 4).await;
        assert!(!waiting.is_finished());
        switch.set(Patience::Deadline(Duration::ZERO));
        assert!(waiting.await.unwrap().unwrap_err().is_transient());
    }

    #[tokio::test]
    async fn a_deadline_ends_the_wait() {
        let (inner, node) = lower();
        inner.fail_next_fetches(u32::MAX);
        let clock = ManualClock::new("2026-11-20T10:15:00Z".parse().unwrap());
        let switch = PatienceSwitch::new(Patience::Deadline(Duration::from_secs(30)));
        let patient = patient(&inner, &switch, Arc::new(clock.clone()));
        let waiting = tokio::spawn(async move { patient.fetch(node, 0..1).await });
        asked(&inner, 4).await;
        assert!(!waiting.is_finished());
        clock.advance(Duration::from_secs(30));
        assert!(waiting.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_store_that_never_answers_is_given_up_and_one_that_does_is_heard_without_any_time() {
        let (inner, node) = lower();
        let switch = PatienceSwitch::new(Patience::Deadline(Duration::ZERO));
        let patient = patient(&inner, &switch, Arc::new(SystemClock));
        assert_eq!(patient.repeat(node, || async { Ok(1) }).await, Ok(1));
        let hangs = || std::future::pending::<Result<(), LowerError>>();
        assert!(patient.repeat(node, hangs).await.unwrap_err().is_transient());
    }

    #[tokio::test]
    async fn what_came_before_the_store_went_away_is_not_fetched_again() {
        let lower = MemoryLower::build(&[("f", 5 * PIECE)]);
        let node = lower.at("f");
        let inner = Arc::new(lower);
        inner.fail_after_pieces(3);
        let patient = patient(&inner, &PatienceSwitch::new(Patience::Forever), Arc::new(SystemClock));
        let mut pieces = patient.fetch(node, 0..5 * PIECE).await.unwrap();
        pieces.sort_by_key(|piece| piece.offset);
        let offsets: Vec<u64> = pieces.iter().map(|piece| piece.offset / PIECE).collect();
        assert_eq!(offsets, [0, 1, 2, 3, 4]);
        assert_eq!(inner.fetches(), 2);
    }

    #[tokio::test]
    async fn a_fetch_that_nobody_waits_for_is_not_repeated() {
        struct Nowhere;
        impl PieceSink for Nowhere {
            fn take(&self, _: Vec<Piece>) -> ControlFlow<()> {
                ControlFlow::Continue(())
            }
        }
        let (inner, node) = lower();
        inner.fail_next_fetches(u32::MAX);
        let patient = patient(&inner, &PatienceSwitch::new(Patience::Forever), Arc::new(SystemClock));
        for (n, urgency) in (1..).zip([Urgency::Background, Urgency::Ahead]) {
            let ranges = [0..8192];
            assert!(patient.fetch_each(node, &ranges, urgency, &Nowhere).await.unwrap_err().is_transient());
            assert_eq!(inner.fetches(), n);
        }
    }

    #[test]
    fn a_range_is_taken_out_of_others() {
        let left = [0..10, 20..30, 40..50];
        assert_eq!(without(&left, &(5..25)), [0..5, 25..30, 40..50]);
        assert_eq!(without(&left, &(22..24)), [0..10, 20..22, 24..30, 40..50]);
        assert_eq!(without(&left, &(10..20)), left);
        assert_eq!(without(&left, &(3..3)), left);
        assert!(without(&left, &(0..100)).is_empty());
    }

    #[tokio::test]
    async fn damage_is_reported_at_once() {
        let (inner, node) = lower();
        inner.damage("f");
        let patient = patient(&inner, &PatienceSwitch::new(Patience::Forever), Arc::new(SystemClock));
        assert!(matches!(patient.fetch(node, 0..1).await, Err(LowerError::Damaged { .. })));
        assert_eq!(inner.fetches(), 1);
    }
}
