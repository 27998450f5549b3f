//! Timeline history files: how a timeline descends from the first.
//!
//! One line for each ancestor: its number, where it was left, and why. Read by the server's rules (timeline.c):
//! comments and empty lines are passed over, numbers ascend, and the file's own number is above all of them.

use crate::pg::lsn::Lsn;
use crate::pg::timeline::TimelineId;

/// The content of `<timeline>.history`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineHistory {
    /// The timeline whose history this is.
    pub timeline: TimelineId,
    /// Its ancestors, oldest first.
    pub switches: Vec<TimelineSwitch>,
}

/// A timeline that was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineSwitch {
    /// The ancestor.
    pub timeline: TimelineId,
    /// Where it was left.
    pub lsn: Lsn,
    /// What the server said about it.
    pub reason: String,
}

/// Why a text is not the history of a timeline.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// A line is not `number LSN reason`.
    #[error("line {line} of the history file of timeline {timeline} is not valid")]
    Line { timeline: TimelineId, line: usize },
    /// Numbers do not ascend towards the file's own.
    #[error("the history file of timeline {timeline} names timelines out of order in line {line}")]
    Order { timeline: TimelineId, line: usize },
    /// There is no ancestor in it.
    #[error("the history file of timeline {timeline} names no parent")]
    Empty { timeline: TimelineId },
}

impl TimelineHistory {
    /// Reads the history file of `timeline`.
    pub fn parse(timeline: TimelineId, text: &str) -> Result<Self, HistoryError> {
        let mut switches: Vec<TimelineSwitch> = Vec::new();
        for (number, content) in text.lines().enumerate() {
            let content = content.trim_start();
            if content.is_empty() || content.starts_with('#') {
                continue;
            }
            let line = number + 1;
            let switch = parse_line(content).ok_or(HistoryError::Line { timeline, line })?;
            let after_last = switches.last().is_none_or(|last| last.timeline < switch.timeline);
            if !after_last || switch.timeline >= timeline {
                return Err(HistoryError::Order { timeline, line });
            }
            switches.push(switch);
        }
        if switches.is_empty() {
            Err(HistoryError::Empty { timeline })
        } else {
            Ok(Self { timeline, switches })
        }
    }

    /// Returns the timeline that this one left, and where.
    pub fn parent(&self) -> &TimelineSwitch {
        self.switches.last().expect("parse refuses a history without an ancestor")
    }
}

fn parse_line(line: &str) -> Option<TimelineSwitch> {
    let (timeline, rest) = line.split_once(char::is_whitespace)?;
    let rest = rest.trim_start();
    let (lsn, reason) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    Some(TimelineSwitch {
        timeline: TimelineId::new(timeline.parse().ok()?)?,
        lsn: lsn.parse().ok()?,
        reason: reason.trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    #[test]
    fn a_history_of_the_server_is_read() {
        let text = "1\t0/3000148\tno recovery target specified\n\n# note\n2\t0/5000000\tbefore 2026-11-20 10:15:00+00\n";
        let history = TimelineHistory::parse(timeline(3), text).unwrap();
        assert_eq!(history.switches.len(), 2);
        assert_eq!(history.parent().timeline, timeline(2));
        assert_eq!(history.parent().lsn, Lsn(0x500_0000));
        assert_eq!(history.switches[0].reason, "no recovery target specified");
    }

    #[test]
    fn what_the_server_would_refuse_is_refused() {
        for (text, line) in [("1 0/1\n1 0/2\n", 2), ("2 0/1\n1 0/2\n", 2), ("3 0/1\n", 1), ("9 0/1\n", 1)] {
            let error = TimelineHistory::parse(timeline(3), text).unwrap_err();
            assert_eq!(error, HistoryError::Order { timeline: timeline(3), line }, "{text:?}");
        }
        for text in ["1\n", "x 0/1\n", "0 0/1\n", "1 zero\n", "-1 0/1"] {
            assert!(
                matches!(TimelineHistory::parse(timeline(3), text), Err(HistoryError::Line { .. })),
                "{text:?}"
            );
        }
        assert!(matches!(TimelineHistory::parse(timeline(3), "# \n"), Err(HistoryError::Empty { .. })));
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text: String, number in 1u32..) {
            let _ = TimelineHistory::parse(timeline(number), &text);
        }
    }
}
