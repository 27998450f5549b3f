//! How often the server of a restore is started again when it ends as it does once one of its processes has crashed.
//!
//! While the directory is unfinished a server that fails again and again is left to a person. Once the directory is plain
//! it is only a server that was told not to start again by itself: then it is always started, after a pause that grows.
//! One that has answered for a while is another server than the one that failed before: its starts are counted anew.

use std::time::{Duration, Instant};

/// A server that fails this often before its directory is plain is not helped by starting it again.
const STARTS_MAX: u32 = 5;
/// One that has answered for so long did not fail by its start.
const SOUND_AFTER: Duration = Duration::from_secs(5 * 60);
/// The pause after the second start that failed; it doubles up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The starts of a server.
#[derive(Debug, Default)]
pub(super) struct Starts {
    count: u32,
    answers_since: Option<Instant>,
}

impl Starts {
    /// Takes note of a start.
    pub(super) fn started(&mut self) {
        self.count += 1;
        self.answers_since = None;
    }

    /// Takes note of whether it answers.
    pub(super) fn looked(&mut self, answers: bool, now: Instant) {
        if !answers {
            self.answers_since = None;
            return;
        }
        let since = *self.answers_since.get_or_insert(now);
        if now.saturating_duration_since(since) >= SOUND_AFTER {
            self.count = 0;
        }
    }

    /// Counts anew: somebody has asked for a start.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Returns how long the next start waits; nothing where there is to be none. One without an end is of a plain directory, or
    /// of a recovery that waits for its archive.
    pub(super) fn pause(&self, is_without_end: bool) -> Option<Duration> {
        if self.count >= STARTS_MAX && !is_without_end {
            return None;
        }
        let Some(doublings) = self.count.checked_sub(2) else { return Some(Duration::ZERO) };
        Some(PAUSE_FIRST.saturating_mul(1 << doublings.min(16)).min(PAUSE_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn an_unfinished_one_is_given_up_and_a_plain_one_never_is() {
        let mut starts = Starts::default();
        let mut pauses = Vec::new();
        for _ in 0..4 {
            starts.started();
            pauses.push(starts.pause(false).unwrap().as_secs());
        }
        assert_eq!(pauses, [0, 1, 2, 4]);
        starts.started();
        assert_eq!((starts.pause(false), starts.pause(true)), (None, Some(8 * SECOND)));
        (0..100).for_each(|_| starts.started());
        assert_eq!((starts.pause(false), starts.pause(true)), (None, Some(PAUSE_MAX)));
        starts.forget();
        assert_eq!(starts.pause(false), Some(Duration::ZERO));
    }

    #[test]
    fn one_that_has_answered_without_a_break_for_long_is_counted_anew() {
        let (mut starts, begun) = (Starts::default(), Instant::now());
        (0..STARTS_MAX).for_each(|_| starts.started());
        starts.looked(true, begun);
        starts.looked(false, begun + SOUND_AFTER - SECOND);
        starts.looked(true, begun + SOUND_AFTER);
        starts.looked(true, begun + 2 * SOUND_AFTER - SECOND);
        assert_eq!(starts.pause(false), None);
        starts.looked(true, begun + 2 * SOUND_AFTER);
        assert_eq!(starts.pause(false), Some(Duration::ZERO));
        // The next one begins anew.
        starts.started();
        starts.looked(true, begun + 3 * SOUND_AFTER);
        (1..STARTS_MAX).for_each(|_| starts.started());
        assert_eq!(starts.pause(false), None);
    }
}
