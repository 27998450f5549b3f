//! Timeline history files: how a timeline descends from the first.
//!
//! One line for each ancestor, from the oldest to the parent: its number, the LSN where it was left, and why. The
//! rules of reading and the bytes of writing are those of the server's `timeline.c`: comments and blank lines are
//! skipped, what follows the LSN is for people, numbers ascend and stay below the file's own. Timeline 1 has no
//! file, so a file without an ancestor is refused, which the server would take.
//!
//! Deliberately absent: which timelines an archive holds and which one a recovery follows (`catalog`).

use std::fmt;

use serde::{Deserialize, Serialize};

use super::lsn::Lsn;
use super::timeline::TimelineId;

/// The content of `<timeline>.history`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineHistory {
    /// The timeline whose history this is.
    pub timeline: TimelineId,
    /// Its ancestors, oldest first; there is at least one.
    pub switches: Vec<TimelineSwitch>,
}

/// A timeline that was left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineSwitch {
    /// The ancestor.
    pub timeline: TimelineId,
    /// The first position that no longer belongs to it.
    pub lsn: Lsn,
    /// What the server noted for people, such as `no recovery target specified`.
    pub reason: String,
}

/// What is wrong with a history file; lines are counted from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    #[error("history of timeline {timeline}, line {line}: expected a timeline number")]
    NoTimeline { timeline: TimelineId, line: usize },
    #[error("history of timeline {timeline}, line {line}: expected the LSN of the switch")]
    NoSwitch { timeline: TimelineId, line: usize },
    #[error("history of timeline {timeline}, line {line}: timeline {found} is not above {previous}")]
    NotIncreasing { timeline: TimelineId, line: usize, found: TimelineId, previous: TimelineId },
    #[error("history of timeline {timeline}: it names timeline {found} as its ancestor")]
    AncestorNotBelow { timeline: TimelineId, found: TimelineId },
    #[error("history of timeline {timeline}: it names no ancestor")]
    Empty { timeline: TimelineId },
}

impl TimelineHistory {
    /// Reads the file `<timeline>.history`.
    ///
    /// Switch points may go back: a server told to recover along timeline 2 to a point before timeline 2 began
    /// writes such a file.
    pub fn parse(timeline: TimelineId, text: &str) -> Result<Self, HistoryError> {
        let mut switches: Vec<TimelineSwitch> = Vec::new();
        for (index, text) in text.lines().enumerate() {
            let (line, text) = (index + 1, text.trim_start());
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let switch = parse_line(timeline, line, text)?;
            if let Some(previous) = switches.last().map(|s| s.timeline).filter(|t| *t >= switch.timeline) {
                let found = switch.timeline;
                return Err(HistoryError::NotIncreasing { timeline, line, found, previous });
            }
            switches.push(switch);
        }
        match switches.last().map(|last| last.timeline) {
            None => Err(HistoryError::Empty { timeline }),
            Some(found) if found >= timeline => Err(HistoryError::AncestorNotBelow { timeline, found }),
            Some(_) => Ok(Self { timeline, switches }),
        }
    }

    /// Returns the timeline that this one left, and where.
    pub fn parent(&self) -> &TimelineSwitch {
        self.switches.last().expect("parse refuses a history without an ancestor")
    }

    /// Lists the timelines this one descends from, oldest first, itself not among them.
    pub fn ancestors(&self) -> impl DoubleEndedIterator<Item = TimelineId> + '_ {
        self.switches.iter().map(|switch| switch.timeline)
    }

    /// Tells whether the WAL of `timeline` at `lsn` is part of this history.
    pub fn contains(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        self.timeline_at(lsn) == timeline
    }

    /// Returns the timeline whose WAL holds the byte at `lsn`; a switch point belongs to the descendant.
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        let left = self.switches.iter().rposition(|switch| switch.lsn <= lsn);
        let next = self.switches.get(left.map_or(0, |index| index + 1));
        next.map_or(self.timeline, |switch| switch.timeline)
    }

    /// Returns where this history left `timeline`, none for the timeline itself and for strangers.
    pub fn switch_of(&self, timeline: TimelineId) -> Option<Lsn> {
        let from = self.switches.iter().position(|switch| switch.timeline == timeline)?;
        self.switches[from..].iter().map(|switch| switch.lsn).min()
    }
}

fn parse_line(timeline: TimelineId, line: usize, text: &str) -> Result<TimelineSwitch, HistoryError> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, rest) = text.split_at(digits);
    let ancestor = number.parse().map_err(|_| HistoryError::NoTimeline { timeline, line })?;
    let rest = rest.trim_start();
    let (lsn, reason) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let lsn = lsn.parse().map_err(|_| HistoryError::NoSwitch { timeline, line })?;
    Ok(TimelineSwitch { timeline: ancestor, lsn, reason: reason.trim().to_owned() })
}

/// Writes the file as the server does, with the empty line it puts between what it copies and what it adds.
impl fmt::Display for TimelineHistory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, TimelineSwitch { timeline, lsn, reason }) in self.switches.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            writeln!(f, "{separator}{timeline}\t{lsn}\t{reason}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    const THIRD: &str =
        "1\t0/3000148\tno recovery target specified\n\n2\t0/5000000\tat restore point \"x\"\n";

    #[test]
    fn a_file_the_server_wrote_is_read_and_written_back() {
        let history = TimelineHistory::parse(tli(3), THIRD).unwrap();
        assert_eq!(history.to_string(), THIRD);
        assert_eq!(history.ancestors().collect::<Vec<_>>(), [tli(1), tli(2)]);
        assert_eq!(history.switches[1].reason, "at restore point \"x\"");
        assert_eq!(history.parent().lsn, Lsn(0x0500_0000));
    }

    #[test]
    fn a_switch_point_belongs_to_the_descendant() {
        let history = TimelineHistory::parse(tli(3), THIRD).unwrap();
        let at = |lsn| history.timeline_at(Lsn(lsn));
        assert_eq!([at(0), at(0x300_0147), at(0x300_0148)], [tli(1), tli(1), tli(2)]);
        assert_eq!([at(0x4FF_FFFF), at(0x500_0000), at(u64::MAX)], [tli(2), tli(3), tli(3)]);
        assert!(history.contains(tli(2), Lsn(0x400_0000)));
        assert!(!history.contains(tli(1), Lsn(0x400_0000)));
        assert_eq!(history.switch_of(tli(1)), Some(Lsn(0x300_0148)));
        assert_eq!(history.switch_of(tli(3)), None);
    }

    #[test]
    fn two_switches_at_one_point_leave_nothing_to_the_first() {
        let history = TimelineHistory::parse(tli(9), "4 0/100 x\n5 0/100 y").unwrap();
        assert_eq!(history.timeline_at(Lsn(0xFF)), tli(4));
        assert_eq!(history.timeline_at(Lsn(0x100)), tli(9));
    }

    #[test]
    fn a_recovery_to_before_its_target_timeline_began_writes_a_switch_that_goes_back() {
        let history = TimelineHistory::parse(tli(3), "1 0/100 x\n2 0/50 y").unwrap();
        assert_eq!(history.timeline_at(Lsn(0x4F)), tli(1));
        assert_eq!(history.timeline_at(Lsn(0x50)), tli(3));
        assert_eq!(history.timeline_at(Lsn(0x100)), tli(3));
        assert_eq!(history.switch_of(tli(1)), Some(Lsn(0x50)));
    }

    #[test]
    fn comments_blank_lines_and_missing_reasons_are_read() {
        let text = "# made by hand\n\n  1   0/A0\n\t2\t1/0\r\n   # end";
        let history = TimelineHistory::parse(tli(7), text).unwrap();
        let switches: Vec<_> = history.switches.iter().map(|e| (e.timeline.get(), e.lsn.0)).collect();
        assert_eq!(switches, [(1, 0xA0), (2, 1 << 32)]);
        let timeline = tli(2);
        assert_eq!(TimelineHistory::parse(timeline, "# x\n"), Err(HistoryError::Empty { timeline }));
    }

    #[test]
    fn what_the_server_refuses_is_refused() {
        let refused = |timeline, text| TimelineHistory::parse(tli(timeline), text).unwrap_err();
        let timeline = tli(5);
        assert_eq!(refused(5, "x\t0/1\n"), HistoryError::NoTimeline { timeline, line: 1 });
        assert_eq!(refused(5, "0\t0/1\n"), HistoryError::NoTimeline { timeline, line: 1 });
        assert_eq!(refused(5, "#\n1\n"), HistoryError::NoSwitch { timeline, line: 2 });
        assert_eq!(refused(5, "1\tnowhere\n"), HistoryError::NoSwitch { timeline, line: 1 });
        assert!(matches!(refused(5, "2\t0/1\n2\t0/2"), HistoryError::NotIncreasing { line: 2, .. }));
        assert_eq!(refused(5, "5\t0/1\n"), HistoryError::AncestorNotBelow { timeline, found: tli(5) });
    }

    prop_compose! {
        fn histories()(
            steps in prop::collection::vec((1u32..1000, 0u64..1000, "[ -~]{0,20}"), 1..20),
            above in 1u32..1000,
        ) -> TimelineHistory {
            let mut parent = 0;
            let mut switches = Vec::new();
            for (step, switch, reason) in steps {
                parent += step;
                switches.push(TimelineSwitch {
                    timeline: tli(parent),
                    lsn: Lsn(switch),
                    reason: reason.trim().to_owned(),
                });
            }
            TimelineHistory { timeline: tli(parent + above), switches }
        }
    }

    proptest! {
        #[test]
        fn text_and_json_round_trip(history in histories()) {
            let read = TimelineHistory::parse(history.timeline, &history.to_string());
            prop_assert_eq!(read.as_ref(), Ok(&history));
            let json = serde_json::to_string(&history).unwrap();
            prop_assert_eq!(&serde_json::from_str::<TimelineHistory>(&json).unwrap(), &history);
        }

        #[test]
        fn every_position_has_exactly_one_timeline(history in histories(), at in 0u64..1100) {
            let candidates = history.ancestors().chain([history.timeline]);
            prop_assert_eq!(candidates.filter(|t| history.contains(*t, Lsn(at))).count(), 1);
        }

        #[test]
        fn any_text_is_read_or_refused(text: String, number in 1u32..) {
            let _ = TimelineHistory::parse(tli(number), &text);
        }
    }
}
