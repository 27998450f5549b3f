//! How long a restore will take: what it has to move, against what a sample of the store has shown.
//!
//! Pure. Fetching and unpacking go on side by side, so the slower of the two decides. Deliberately absent: the disk,
//! which cannot be measured without writing to it, and the replay of WAL, which is PostgreSQL's.

use std::time::Duration;

use serde::Serialize;

/// What a restore has to move, at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Stored bytes to fetch.
    pub stored_bytes: u64,
    /// Requests they take.
    pub requests: u64,
    /// Bytes to unpack.
    pub bytes: u64,
}

/// What was measured with a few requests of the kind that a restore makes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sample {
    /// Requests that were, and will be, under way at once.
    pub at_once: usize,
    /// How long a request takes that asks for little.
    pub round_trip: Duration,
    /// Stored bytes that were fetched by `at_once` requests at the same time.
    pub fetched_bytes: u64,
    /// How long that took, the round trip included.
    pub fetched_in: Duration,
    /// Bytes that those became.
    pub unpacked_bytes: u64,
    /// How long all threads took to authenticate and inflate them.
    pub unpacked_in: Duration,
}

/// What decides how long it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// The way from the store.
    Store,
    /// The processors of this host.
    Processors,
}

/// How long a restore takes, if the disk keeps up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// From the first request to the last file.
    pub duration: Duration,
    /// Why not less.
    pub limit: Limit,
    /// Bytes per second from the store, all requests together, and out of the processors; none where too little was
    /// measured to tell.
    pub rates: (Option<u64>, Option<u64>),
}

/// A round trip measured by itself may have been slower than the one within a fetch, which must not make bytes free.
const MOVING_SHARE_MIN: u32 = 4;

/// Estimates from a sample how long the work takes.
pub fn estimate(work: &Work, sample: &Sample) -> Estimate {
    let moved_in =
        sample.fetched_in.saturating_sub(sample.round_trip).max(sample.fetched_in / MOVING_SHARE_MIN);
    let rates = (rate(sample.fetched_bytes, moved_in), rate(sample.unpacked_bytes, sample.unpacked_in));
    let waves = work.requests.div_ceil(sample.at_once.max(1) as u64);
    let waiting = sample.round_trip.as_secs_f64() * waves as f64;
    let store = waiting + seconds(work.stored_bytes, rates.0);
    let processors = seconds(work.bytes, rates.1);
    let limit = if processors > store { Limit::Processors } else { Limit::Store };
    let duration = Duration::try_from_secs_f64(store.max(processors)).unwrap_or(Duration::MAX);
    Estimate { duration, limit, rates }
}

fn rate(bytes: u64, time: Duration) -> Option<u64> {
    let rate = bytes as f64 / time.as_secs_f64();
    (rate.is_finite() && rate >= 1.0).then_some(rate as u64)
}

/// Without a rate the bytes count nothing: there were none, or they came faster than a clock tells.
fn seconds(bytes: u64, rate: Option<u64>) -> f64 {
    rate.map_or(0.0, |rate| bytes as f64 / rate as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// 8 requests at once: 20 ms a round trip, 100 MiB/s together, 400 MiB/s unpacked.
    fn far() -> Sample {
        Sample {
            at_once: 8,
            round_trip: ms(20),
            fetched_bytes: 10 * MIB,
            fetched_in: ms(120),
            unpacked_bytes: 40 * MIB,
            unpacked_in: ms(100),
        }
    }

    #[test]
    fn round_trips_are_shared_by_the_requests_under_way_and_bytes_are_not() {
        for (stored_mib, requests, expected) in [
            (0, 0, 0),
            (0, 1, 20),
            (0, 8, 20),
            (0, 9, 40),
            (0, 800, 2000),
            (100, 8, 1020),
            (1000, 80, 10_200),
        ] {
            let work = Work { stored_bytes: stored_mib * MIB, requests, bytes: 0 };
            let found = estimate(&work, &far());
            assert_eq!(found.duration.as_millis(), expected, "{work:?}");
            assert_eq!(found.limit, Limit::Store);
        }
        let one = Sample { at_once: 1, ..far() };
        let work = Work { stored_bytes: 0, requests: 80, bytes: 0 };
        assert_eq!(estimate(&work, &one).duration, ms(1600));
    }

    #[test]
    fn the_slower_of_fetching_and_unpacking_decides() {
        let work = Work { stored_bytes: 100 * MIB, requests: 8, bytes: 2000 * MIB };
        let found = estimate(&work, &far());
        assert_eq!((found.duration, found.limit), (ms(5000), Limit::Processors));
        assert_eq!(found.rates, (Some(100 * MIB), Some(400 * MIB)));
        let slow = Sample { fetched_in: ms(1020), ..far() };
        let found = estimate(&work, &slow);
        assert_eq!((found.duration, found.limit), (ms(10_020), Limit::Store));
    }

    #[test]
    fn what_was_too_little_to_measure_gives_no_rate_and_no_nonsense() {
        let work = Work { stored_bytes: u64::MAX, requests: 1, bytes: u64::MAX };
        let nothing = Sample::default();
        assert_eq!(
            estimate(&work, &nothing),
            Estimate { duration: Duration::ZERO, limit: Limit::Store, rates: (None, None) }
        );
        // A round trip that took longer by itself than with bytes: they are not free.
        let jitter = Sample { round_trip: ms(500), ..far() };
        assert_eq!(estimate(&work, &jitter).rates.0, Some(10 * MIB * 1000 / 30));
        let forever = Sample { fetched_bytes: 1, fetched_in: Duration::from_secs(1), ..far() };
        assert!(estimate(&work, &forever).duration > Duration::from_secs(1 << 40));
    }
}
