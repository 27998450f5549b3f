//! Time, and the only place that reads it.
//!
//! Everything above takes a `Clock`, so that a test can stand still, jump an hour or replay a day. Clocks
//! decide when to give up and what a thing is called; they never decide what is safe.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;

/// A source of wall-clock and monotonic time.
pub trait Clock: Send + Sync + Debug {
    /// Returns the wall-clock time.
    fn now(&self) -> Timestamp;

    /// Returns a reading for measuring durations and deadlines, immune to steps of the wall clock.
    fn monotonic(&self) -> Instant;
}

/// The machine's own clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn monotonic(&self) -> Instant {
        Instant::now()
    }
}

/// A clock that moves only when told to, shared by its clones.
#[derive(Debug, Clone)]
pub struct ManualClock {
    state: Arc<Mutex<(Timestamp, Instant)>>,
}

impl ManualClock {
    /// Creates a clock that stands at `now`.
    pub fn new(now: Timestamp) -> Self {
        Self { state: Arc::new(Mutex::new((now, Instant::now()))) }
    }

    /// Moves both readings forward.
    pub fn advance(&self, by: Duration) {
        let mut state = self.state.lock().expect("no holder of this lock panics");
        state.0 += by;
        state.1 += by;
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        self.state.lock().expect("no holder of this lock panics").0
    }

    fn monotonic(&self) -> Instant {
        self.state.lock().expect("no holder of this lock panics").1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let start: Timestamp = "2026-11-20T10:15:00Z".parse().unwrap();
        let clock = ManualClock::new(start);
        let copy = clock.clone();
        assert_eq!(copy.now(), start);
        clock.advance(Duration::from_secs(90));
        assert_eq!(copy.now().to_string(), "2026-11-20T10:16:30Z");
        assert_eq!(copy.monotonic(), clock.monotonic());
    }
}
