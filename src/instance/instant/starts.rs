//! Whether, and when, the server of a restore is started again that has ended by itself.
//!
//! One that recovers, or never came so far as to answer, may have ended for want of the store: that is asked first. One that
//! answered, and ended as it does once one of its processes has crashed, is started again: it was told to leave that to us.
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
    has_answered: bool,
}

/// A server that has ended, and was stopped by nobody. Damage that was met is no part of it: that may be of a file that
/// nobody reads, and who reads it on its way is given up after a few starts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ended {
    /// Whether the directory needs nothing of the store any more.
    pub is_plain: bool,
    /// Whether it has not come to its target.
    pub is_recovering: bool,
    /// Whether its archive could not tell what is there.
    pub archive_is_away: bool,
    /// Whether it ended as it does of its own accord once one of its processes has crashed.
    pub has_crashed: bool,
}

/// What follows from the end of a server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It is left to a person.
    Nothing,
    /// After this pause the store is asked.
    AskStore(Duration),
    /// After this pause it is started.
    Start(Duration),
}

impl Starts {
    /// Takes note of a start.
    pub(super) fn started(&mut self) {
        self.count += 1;
        self.answers_since = None;
        self.has_answered = false;
    }

    /// Tells whether the one that was started last has answered.
    pub(super) fn has_answered(&self) -> bool {
        self.has_answered
    }

    /// Takes note of whether it answers.
    pub(super) fn looked(&mut self, answers: bool, now: Instant) {
        if !answers {
            self.answers_since = None;
            return;
        }
        self.has_answered = true;
        let since = *self.answers_since.get_or_insert(now);
        if now.saturating_duration_since(since) >= SOUND_AFTER {
            self.count = 0;
        }
    }

    /// Counts anew: somebody has asked for a start.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Decides what follows from the end of one.
    pub(super) fn plan_next(&self, ended: Ended) -> Next {
        let Ended { is_plain, is_recovering, archive_is_away, has_crashed } = ended;
        let Some(pause) = self.pause(is_plain || archive_is_away) else { return Next::Nothing };
        if is_recovering || !is_plain && !self.has_answered {
            Next::AskStore(pause)
        } else if has_crashed {
            Next::Start(pause)
        } else {
            Next::Nothing
        }
    }

    /// Returns how long the next start waits; nothing where there is to be none. One without an end is of a plain directory, or
    /// of a recovery that waits for its archive.
    fn pause(&self, is_without_end: bool) -> Option<Duration> {
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
    fn one_that_may_have_missed_the_store_waits_for_it_and_one_that_crashed_starts_at_once() {
        let ran = Ended { is_plain: false, is_recovering: false, archive_is_away: false, has_crashed: false };
        let crashed = Ended { has_crashed: true, ..ran };
        let mut starts = Starts::default();
        starts.started();
        assert_eq!(starts.plan_next(ran), Next::AskStore(Duration::ZERO), "it came to no end of its start");
        assert_eq!(starts.plan_next(crashed), Next::AskStore(Duration::ZERO));
        let plain = Ended { is_plain: true, ..crashed };
        assert_eq!(starts.plan_next(plain), Next::Start(Duration::ZERO), "the store is nothing to it");
        starts.looked(true, Instant::now());
        assert!(starts.has_answered());
        assert_eq!(starts.plan_next(ran), Next::Nothing, "it was ended by somebody");
        assert_eq!(starts.plan_next(crashed), Next::Start(Duration::ZERO));
        let at_target = Ended { is_recovering: true, ..crashed };
        assert_eq!(starts.plan_next(at_target), Next::AskStore(Duration::ZERO));
        (1..STARTS_MAX).for_each(|_| starts.started());
        assert_eq!(starts.plan_next(at_target), Next::Nothing);
        assert_eq!(
            starts.plan_next(Ended { archive_is_away: true, ..at_target }),
            Next::AskStore(8 * SECOND)
        );
        assert_eq!(starts.plan_next(plain), Next::Start(8 * SECOND));
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
