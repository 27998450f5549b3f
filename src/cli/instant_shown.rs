//! What is said to a person while a restore that is used at once is followed: that nothing is mounted yet, that the server
//! answers, what is waited for; then one line of progress until the directory is plain.
//!
//! Each thing is said once, but that nothing is mounted yet, which is said again each time it has lasted twice as long.

use std::sync::Arc;
use std::time::Duration;

use crate::control::{HydrationState, RestoreStatus, RestoredServer};
use crate::monitor::{Monitor, Progress, Task};

/// Opening a basebackup takes a moment; what takes longer is told.
const SILENCE_FIRST: Duration = Duration::from_secs(5);

/// What has been shown of a restore.
pub(super) struct Shown<'a> {
    monitor: Arc<dyn Monitor>,
    say: Box<dyn Fn(&str) + 'a>,
    progress: Option<Progress>,
    bytes: u64,
    has_answered: bool,
    has_waited: bool,
    waits_for: Option<String>,
    silence_max: Duration,
}

impl<'a> Shown<'a> {
    /// Shows progress to a monitor, and says the rest.
    pub(super) fn new(monitor: Arc<dyn Monitor>, say: impl Fn(&str) + 'a) -> Self {
        Self {
            monitor,
            say: Box::new(say),
            progress: None,
            bytes: 0,
            has_answered: false,
            has_waited: false,
            waits_for: None,
            silence_max: SILENCE_FIRST,
        }
    }

    /// Shows that nobody serves it yet, and what `said` returns: the last word of whoever is to.
    pub(super) fn show_silence(&mut self, silence: Duration, said: impl FnOnce() -> Option<String>) {
        if silence < self.silence_max {
            return;
        }
        self.silence_max = silence * 2;
        let said = said().map(|said| format!(": {said}")).unwrap_or_default();
        (self.say)(&format!("nothing is mounted after {} s{said}", silence.as_secs()));
    }

    /// Shows how it is.
    pub(super) fn show(&mut self, status: &RestoreStatus) {
        if let Some(seconds) = status.answered_after_seconds.filter(|_| !self.has_answered) {
            self.has_answered = true;
            (self.say)(&format!("answering queries after {seconds:.1} s ({})", status.server));
        }
        // Once: it may start again and again until the store is back.
        if let (RestoredServer::Recovering, Some(message), false) =
            (status.server, &status.message, self.has_waited)
        {
            self.has_waited = true;
            (self.say)(&format!("recovery starts again when the store has what it needs: {message}"));
        }
        if status.hydration.state == HydrationState::Waiting && status.hydration.reason != self.waits_for {
            self.waits_for.clone_from(&status.hydration.reason);
            (self.say)(&format!("the rest waits: {}", self.waits_for.as_deref().unwrap_or_default()));
        }
        if !self.has_answered || !status.hydrates {
            return;
        }
        // Short, so that the time that is left fits on a terminal.
        let task = Task::bytes("plain directory", Some(status.total_bytes));
        let progress = self.progress.get_or_insert_with(|| self.monitor.start(task));
        progress.advance(status.hydrated_bytes.saturating_sub(self.bytes));
        self.bytes = self.bytes.max(status.hydrated_bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::cli::instant::tests::status;
    use crate::control::HydrationStatus;
    use crate::monitor::RecordingMonitor;

    const LINE: &str = "plain directory";

    #[test]
    fn one_line_tells_how_much_is_there_from_the_first_answer_on() {
        let (monitor, said) = (Arc::new(RecordingMonitor::new()), RefCell::new(Vec::new()));
        let mut shown = Shown::new(monitor.clone(), |text| said.borrow_mut().push(text.to_owned()));
        let at = |bytes: u64, answered: Option<f64>| RestoreStatus {
            hydrated_bytes: bytes,
            total_bytes: 100,
            ..status(RestoredServer::Running, true, answered)
        };
        shown.show(&at(10, None));
        assert!(monitor.tasks(LINE).is_empty(), "nobody can use it yet");
        // What was counted may become less: a file was dropped.
        for bytes in [30, 50, 40, 60] {
            shown.show(&at(bytes, Some(3.12)));
        }
        assert_eq!(*said.borrow(), ["answering queries after 3.1 s (running)"]);
        let lines: Vec<_> = monitor.tasks(LINE);
        let amounts: Vec<_> = lines.iter().map(|line| (line.state().done(), line.state().total())).collect();
        assert_eq!(amounts, [(60, Some(100))]);
        drop(shown);
        assert!(monitor.unfinished().is_empty());
    }

    #[test]
    fn what_does_not_come_has_no_line() {
        let monitor = Arc::new(RecordingMonitor::new());
        let mut shown = Shown::new(monitor.clone(), |_| {});
        shown.show(&status(RestoredServer::Running, false, Some(1.0)));
        assert!(monitor.tasks(LINE).is_empty());
    }

    #[test]
    fn what_is_waited_for_is_said_once_and_anew_where_it_is_something_else() {
        let said = RefCell::new(Vec::new());
        let mut shown =
            Shown::new(Arc::new(RecordingMonitor::new()), |text| said.borrow_mut().push(text.to_owned()));
        for reason in ["the store", "the store", "room"] {
            shown.show(&RestoreStatus {
                message: Some("no WAL".to_owned()),
                hydration: HydrationStatus {
                    state: HydrationState::Waiting,
                    reason: Some(reason.to_owned()),
                    ..HydrationStatus::default()
                },
                ..status(RestoredServer::Recovering, true, None)
            });
        }
        let wanted = [
            "recovery starts again when the store has what it needs: no WAL",
            "the rest waits: the store",
            "the rest waits: room",
        ];
        assert_eq!(*said.borrow(), wanted);
    }

    #[test]
    fn a_silence_is_told_and_again_when_it_has_lasted_twice_as_long() {
        let said = RefCell::new(Vec::new());
        let mut shown =
            Shown::new(Arc::new(RecordingMonitor::new()), |text| said.borrow_mut().push(text.to_owned()));
        for seconds in [0, 4, 5, 6, 9, 11, 21, 23] {
            let last = (seconds > 10).then(|| "trying again".to_owned());
            shown.show_silence(Duration::from_secs(seconds), || last);
        }
        let wanted = [
            "nothing is mounted after 5 s",
            "nothing is mounted after 11 s: trying again",
            "nothing is mounted after 23 s: trying again",
        ];
        assert_eq!(*said.borrow(), wanted);
    }
}
