//! How fast: a limit to bytes in a second, and a pause that doubles while something fails.
//! Pure: both are told what time it is and nobody waits here.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// Lets through so many bytes a second.
///
/// What goes through may go whole, however large it is, and the next waits until its time is over. Nothing is saved up:
/// after an hour without work no burst follows.
#[derive(Debug, Clone)]
pub(crate) struct TokenBucket {
    rate: NonZeroU64,
    free_at: Option<Instant>,
}

/// A pause that doubles from failure to failure.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    pause: Duration,
    until: Option<Instant>,
}

impl TokenBucket {
    /// Creates a bucket that has let nothing through yet.
    pub(crate) fn new(rate: NonZeroU64) -> Self {
        Self { rate, free_at: None }
    }

    /// Returns how long to wait before anything more may go through.
    pub(crate) fn wait(&self, now: Instant) -> Duration {
        self.free_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
    }

    /// Lets bytes through.
    pub(crate) fn spend(&mut self, bytes: u64, now: Instant) {
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate.get());
        let takes = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        let begins = self.free_at.map_or(now, |at| at.max(now));
        self.free_at = Some(begins.checked_add(takes).unwrap_or(begins));
    }
}

impl Backoff {
    /// Creates a pause that has not begun.
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, pause: Duration::ZERO, until: None }
    }

    /// Takes note of a failure; those that fail during a pause are the same one.
    pub(crate) fn failed(&mut self, now: Instant) {
        if self.left(now).is_zero() {
            self.pause = if self.pause.is_zero() { self.first } else { (self.pause * 2).min(self.longest) };
            self.until = Some(now + self.pause);
        }
    }

    /// Takes note that it works again.
    pub(crate) fn succeeded(&mut self) {
        self.pause = Duration::ZERO;
        self.until = None;
    }

    /// Returns what is left of the pause.
    pub(crate) fn left(&self, now: Instant) -> Duration {
        self.until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::{Clock, SystemClock};

    fn bucket(rate: u64) -> TokenBucket {
        TokenBucket::new(NonZeroU64::new(rate).unwrap())
    }

    #[test]
    fn what_has_gone_through_is_waited_for_and_nothing_is_saved_up() {
        let begun = SystemClock.monotonic();
        let mut bucket = bucket(1000);
        assert_eq!(bucket.wait(begun), Duration::ZERO);
        bucket.spend(500, begun);
        assert_eq!(bucket.wait(begun), Duration::from_millis(500));
        bucket.spend(1000, begun);
        assert_eq!(bucket.wait(begun + Duration::from_millis(1400)), Duration::from_millis(100));
        let later = begun + Duration::from_secs(3600);
        assert_eq!(bucket.wait(later), Duration::ZERO);
        bucket.spend(1000, later);
        assert_eq!(bucket.wait(later), Duration::from_secs(1));
    }

    #[test]
    fn the_smallest_rate_and_the_largest_part_have_a_time() {
        let now = SystemClock.monotonic();
        let mut bucket = bucket(1);
        bucket.spend(u64::MAX, now);
        bucket.spend(u64::MAX, now);
        assert!(bucket.wait(now) > Duration::from_secs(1 << 20));
    }

    #[test]
    fn a_pause_doubles_up_to_its_limit_and_ends_with_success() {
        let now = SystemClock.monotonic();
        let second = Duration::from_secs(1);
        let mut backoff = Backoff::new(second, 3 * second);
        assert_eq!(backoff.left(now), Duration::ZERO);
        backoff.failed(now);
        backoff.failed(now);
        assert_eq!(backoff.left(now), second);
        backoff.failed(now + second);
        assert_eq!(backoff.left(now + second), 2 * second);
        backoff.failed(now + 3 * second);
        assert_eq!(backoff.left(now + 3 * second), 3 * second);
        backoff.succeeded();
        assert_eq!(backoff.left(now), Duration::ZERO);
        backoff.failed(now);
        assert_eq!(backoff.left(now), second);
    }

    proptest! {
        #[test]
        fn no_more_goes_through_than_the_rate_allows(
            rate in 1u64..10_000,
            parts in prop::collection::vec((0u64..5000, 0u64..2000), 1..40),
        ) {
            let begun = SystemClock.monotonic();
            let (mut now, mut gone, mut bucket) = (begun, 0, bucket(rate));
            for (bytes, idle_ms) in parts {
                now += bucket.wait(now) + Duration::from_millis(idle_ms);
                // What went through before has had its time by now; a nanosecond for each rounding.
                let allowed = (now - begun).as_secs_f64() * rate as f64;
                prop_assert!(gone as f64 <= allowed + 1.0, "{gone} bytes, {allowed} allowed");
                bucket.spend(bytes, now);
                gone += bytes;
            }
        }
    }
}
