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

/// A pause that doubles from failure to failure. After it one goes ahead, and the others wait for what comes of that.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    pause: Duration,
    until: Option<Instant>,
    /// Somebody has gone ahead.
    is_tried: bool,
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
        Self { first, longest, pause: Duration::ZERO, until: None, is_tried: false }
    }

    /// Takes note of a failure, and tells whether it begins a pause: those that fail during one are the same.
    pub(crate) fn failed(&mut self, now: Instant) -> bool {
        let begins = self.is_tried || self.left(now).is_zero();
        if begins {
            self.pause = if self.pause.is_zero() { self.first } else { (self.pause * 2).min(self.longest) };
            self.until = Some(now + self.pause);
            self.is_tried = false;
        }
        begins
    }

    /// Returns how long to wait; whoever need not, and is told so after a pause, goes ahead alone.
    pub(crate) fn wait(&mut self, now: Instant) -> Duration {
        let left = self.left(now);
        if left.is_zero() && !self.pause.is_zero() {
            self.until = Some(now + self.longest);
            self.is_tried = true;
        }
        left
    }

    /// Takes note that it works again.
    pub(crate) fn succeeded(&mut self) {
        self.pause = Duration::ZERO;
        self.until = None;
        self.is_tried = false;
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
        assert!(backoff.failed(now) && !backoff.failed(now));
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

    #[test]
    fn after_a_pause_one_goes_ahead_and_the_others_wait_for_it() {
        let now = SystemClock.monotonic();
        let second = Duration::from_secs(1);
        let mut backoff = Backoff::new(second, 60 * second);
        assert_eq!((backoff.wait(now), backoff.wait(now)), (Duration::ZERO, Duration::ZERO));
        backoff.failed(now);
        let later = now + second;
        assert_eq!((backoff.wait(later), backoff.wait(later)), (Duration::ZERO, 60 * second));
        assert!(backoff.failed(later));
        assert_eq!(backoff.wait(later), 2 * second);
        let later = later + 2 * second;
        assert_eq!(backoff.wait(later), Duration::ZERO);
        backoff.succeeded();
        assert_eq!((backoff.wait(later), backoff.wait(later)), (Duration::ZERO, Duration::ZERO));
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
