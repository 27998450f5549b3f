//! How far hydration is: what is missing, how fast it comes, and what it waits for.
//!
//! A survey says how much is missing; from then on the hydrator takes off what it fetched, and what it found local or no
//! longer needed when it came to a file. What reads of others made local in the meantime is known in sum alone, and is
//! taken off until the hydrator comes to the files and sees for itself; so nothing is counted twice.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// What a hydrator is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HydrationState {
    /// Nothing is fetched unless it is read.
    Off,
    /// It would go on, but for what the reason says.
    Waiting,
    /// It fetches.
    Running,
    /// Everything is local and on stable storage.
    Done,
    /// Something could not be made local; the reason says what came first.
    Failed,
}

/// How far hydration is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HydrationReport {
    /// What the hydrator is doing.
    pub state: HydrationState,
    /// What it waits for, or why it failed.
    pub reason: Option<String>,
    /// Bytes that are not local; nothing before the first survey.
    pub missing_bytes: Option<u64>,
    /// Bytes that became local in a second, over the last seconds.
    pub bytes_per_second: u64,
    /// Time that what is missing takes at this rate.
    pub seconds_left: Option<u64>,
    /// Files that could not be made local.
    pub failed_files: u64,
}

/// What a hydrator writes down while it works, and whoever asks reads.
#[derive(Debug)]
pub(crate) struct Watch {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: HydrationState,
    reason: Option<String>,
    progress: Option<Progress>,
    meter: RateMeter,
    failed_files: u64,
}

/// The arithmetic of what is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Progress {
    /// As the hydrator knows it.
    missing: u64,
    /// Bytes the uppers had been filled with when the survey was made.
    filled_before: u64,
    /// Of those since then, the hydrator's own.
    fetched: u64,
    /// Of those of others, what it has come across.
    met: u64,
}

/// Bytes in a second, over the last [`WINDOW`].
#[derive(Debug, Default)]
struct RateMeter {
    samples: VecDeque<(Instant, u64)>,
}

/// How far back a rate looks: long enough to even out parts of some MiB, short enough to show that it stands still.
const WINDOW: Duration = Duration::from_secs(10);
/// Samples are this far apart, which bounds their number.
const SAMPLE_SPACING: Duration = Duration::from_millis(250);

impl Watch {
    /// Creates the record of a hydrator that has not been started.
    pub(crate) fn new(state: HydrationState, reason: Option<String>) -> Self {
        let done = Progress { missing: 0, filled_before: 0, fetched: 0, met: 0 };
        let progress = (state == HydrationState::Done).then_some(done);
        let inner = Inner { state, reason, progress, meter: RateMeter::default(), failed_files: 0 };
        Self { inner: Mutex::new(inner) }
    }

    /// Takes note that the hydrator begins, perhaps anew.
    pub(crate) fn begins(&self) {
        let mut inner = self.lock();
        (inner.state, inner.reason, inner.failed_files) = (HydrationState::Running, None, 0);
    }

    /// Takes note of what the hydrator waits for.
    pub(crate) fn waits(&self, reason: &str) {
        let mut inner = self.lock();
        let is_on = inner.state != HydrationState::Off;
        if is_on && inner.reason.as_deref() != Some(reason) {
            (inner.state, inner.reason) = (HydrationState::Waiting, Some(reason.to_owned()));
        }
    }

    /// Takes note that the hydrator has ended, and why where it failed.
    pub(crate) fn ends(&self, state: HydrationState, reason: Option<String>) {
        let mut inner = self.lock();
        (inner.state, inner.reason) = (state, reason);
    }

    /// Takes note that it goes on, if it waited.
    pub(crate) fn goes_on(&self) {
        let mut inner = self.lock();
        if inner.state == HydrationState::Waiting {
            (inner.state, inner.reason) = (HydrationState::Running, None);
        }
    }

    /// Takes note of what a survey found missing, and what the uppers had been filled with by then.
    pub(crate) fn surveyed(&self, missing: u64, filled: u64) {
        self.lock().progress = Some(Progress { missing, filled_before: filled, fetched: 0, met: 0 });
    }

    /// Takes note of bytes that the hydrator fetched; `filled` as in [`Self::surveyed`].
    pub(crate) fn fetched(&self, bytes: u64, filled: u64, now: Instant) {
        let mut inner = self.lock();
        inner.meter.note(now, filled);
        if let Some(progress) = &mut inner.progress {
            progress.fetch(bytes);
        }
    }

    /// Takes note of bytes that were missing and need not be fetched.
    pub(crate) fn settled(&self, bytes: u64, filled: u64) {
        if let Some(progress) = &mut self.lock().progress {
            progress.settle(bytes, filled);
        }
    }

    /// Counts a file that could not be made local.
    pub(crate) fn file_failed(&self) {
        self.lock().failed_files += 1;
    }

    /// Returns how far it is.
    pub(crate) fn report(&self, filled: u64, now: Instant) -> HydrationReport {
        let mut inner = self.lock();
        inner.meter.note(now, filled);
        let bytes_per_second = inner.meter.per_second(now, filled);
        let missing_bytes = inner.progress.map(|progress| progress.missing(filled));
        let is_going = matches!(inner.state, HydrationState::Running | HydrationState::Waiting);
        let left =
            missing_bytes.filter(|_| is_going).and_then(|missing| missing.checked_div(bytes_per_second));
        HydrationReport {
            state: inner.state,
            reason: inner.reason.clone(),
            missing_bytes,
            bytes_per_second,
            seconds_left: left,
            failed_files: inner.failed_files,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }
}

impl Progress {
    fn fetch(&mut self, bytes: u64) {
        self.missing = self.missing.saturating_sub(bytes);
        self.fetched += bytes;
    }

    fn settle(&mut self, bytes: u64, filled: u64) {
        self.met += bytes.min(self.of_others(filled));
        self.missing = self.missing.saturating_sub(bytes);
    }

    /// Returns what others have made local and the hydrator has not come across.
    fn of_others(&self, filled: u64) -> u64 {
        filled.saturating_sub(self.filled_before).saturating_sub(self.fetched).saturating_sub(self.met)
    }

    fn missing(&self, filled: u64) -> u64 {
        self.missing.saturating_sub(self.of_others(filled))
    }
}

impl RateMeter {
    fn note(&mut self, now: Instant, bytes: u64) {
        if self.samples.back().is_none_or(|(at, _)| now.saturating_duration_since(*at) >= SAMPLE_SPACING) {
            self.samples.push_back((now, bytes));
        }
        // One stays that is as old as the window: the rate is the difference to it.
        while self.samples.get(1).is_some_and(|(at, _)| now.saturating_duration_since(*at) >= WINDOW) {
            self.samples.pop_front();
        }
    }

    fn per_second(&self, now: Instant, bytes: u64) -> u64 {
        let Some((since, before)) = self.samples.front() else { return 0 };
        let seconds = now.saturating_duration_since(*since).as_secs_f64();
        if seconds < SAMPLE_SPACING.as_secs_f64() {
            return 0;
        }
        (bytes.saturating_sub(*before) as f64 / seconds) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Clock, SystemClock};

    #[test]
    fn nothing_is_taken_off_twice() {
        let mut progress = Progress { missing: 1000, filled_before: 50, fetched: 0, met: 0 };
        assert_eq!(progress.missing(50), 1000);
        // Others read 100 bytes of a file of 300, the hydrator fetches another of 200.
        assert_eq!(progress.missing(150), 900);
        progress.fetch(200);
        assert_eq!(progress.missing(350), 700);
        // It comes to the first: 100 are local, it fetches the rest.
        progress.settle(100, 350);
        assert_eq!(progress.missing(350), 700);
        progress.fetch(200);
        assert_eq!(progress.missing(550), 500);
        // A file of 500 is gone, which nobody had to fill.
        progress.settle(500, 550);
        assert_eq!(progress.missing(550), 0);
        assert_eq!(progress.missing(10_000), 0);
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let begun = SystemClock.monotonic();
        let at = |seconds: u64| begun + Duration::from_secs(seconds);
        let mut meter = RateMeter::default();
        assert_eq!(meter.per_second(begun, 0), 0);
        for second in 0..=20 {
            meter.note(at(second), second * 100);
        }
        assert_eq!(meter.per_second(at(20), 2000), 100);
        assert!(meter.samples.len() < 20, "{}", meter.samples.len());
        for second in 21..60 {
            meter.note(at(second), 2000);
        }
        assert_eq!(meter.per_second(at(60), 2000), 0);
    }

    #[test]
    fn a_report_says_how_long_the_rest_takes() {
        let now = SystemClock.monotonic();
        let watch = Watch::new(HydrationState::Waiting, Some("the server".to_owned()));
        assert_eq!(watch.report(0, now).missing_bytes, None);
        watch.goes_on();
        watch.surveyed(5000, 0);
        watch.fetched(1000, 1000, now + Duration::from_secs(1));
        let report = watch.report(1000, now + Duration::from_secs(1));
        assert_eq!((report.state, report.reason.as_deref()), (HydrationState::Running, None));
        assert_eq!((report.bytes_per_second, report.seconds_left), (1000, Some(4)));
        watch.ends(HydrationState::Failed, Some("a pack is damaged".to_owned()));
        watch.goes_on();
        let report = watch.report(1000, now + Duration::from_secs(2));
        assert_eq!((report.state, report.missing_bytes), (HydrationState::Failed, Some(4000)));
        assert_eq!(report.seconds_left, None);
    }
}
