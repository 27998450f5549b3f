//! Where recovery is to end, in PostgreSQL's own terms.
//!
//! At most one target; with none recovery goes to the end of the archive. What the words become in
//! `postgresql.auto.conf` or on a command line is decided here and nowhere else.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::pg::{Lsn, TimelineId};

/// Where recovery ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// At the end of the archive.
    #[default]
    Latest,
    /// As soon as the basebackup is consistent.
    Immediate,
    /// At the last commit before, or up to and including, this time.
    Time(Timestamp),
    /// At this position.
    Lsn(Lsn),
    /// At this transaction's end.
    Xid(String),
    /// At the restore point of this name.
    Name(String),
}

/// What the server does at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetAction {
    /// Waits, readable.
    Pause,
    /// Ends recovery and takes writes.
    Promote,
    /// Stops.
    Shutdown,
}

/// A target with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryTarget {
    /// Where recovery ends.
    pub target: Target,
    /// Whether it ends just after the target, or just before.
    pub inclusive: bool,
    /// Which timeline it follows; the newest descendant of the basebackup's where none is named.
    pub timeline: Option<TimelineId>,
    /// What happens there.
    pub action: TargetAction,
}

impl RecoveryTarget {
    /// Recovery to the end of the archive, then writes.
    pub fn latest(action: TargetAction) -> Self {
        Self { target: Target::Latest, inclusive: true, timeline: None, action }
    }

    /// Returns the server's settings for this target on `timeline`.
    pub fn settings(&self, timeline: TimelineId) -> Vec<(&'static str, String)> {
        let mut settings = vec![("recovery_target_timeline", timeline.to_string())];
        match &self.target {
            Target::Latest => {}
            Target::Immediate => settings.push(("recovery_target", "immediate".to_owned())),
            // A zone is always written: the server's own TimeZone must not decide.
            Target::Time(time) => {
                settings
                    .push(("recovery_target_time", time.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string()));
            }
            Target::Lsn(lsn) => settings.push(("recovery_target_lsn", lsn.to_string())),
            Target::Xid(xid) => settings.push(("recovery_target_xid", xid.clone())),
            Target::Name(name) => settings.push(("recovery_target_name", name.clone())),
        }
        if matches!(self.target, Target::Time(_) | Target::Lsn(_) | Target::Xid(_)) && !self.inclusive {
            settings.push(("recovery_target_inclusive", "off".to_owned()));
        }
        if self.target != Target::Latest {
            settings.push(("recovery_target_action", self.action.to_string()));
        }
        settings
    }
}

impl fmt::Display for TargetAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pause => "pause",
            Self::Promote => "promote",
            Self::Shutdown => "shutdown",
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("the end of the archive"),
            Self::Immediate => f.write_str("the end of the basebackup"),
            Self::Time(time) => write!(f, "time {time}"),
            Self::Lsn(lsn) => write!(f, "LSN {lsn}"),
            Self::Xid(xid) => write!(f, "transaction {xid}"),
            Self::Name(name) => write!(f, "restore point \"{name}\""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_the_servers_and_the_timeline_is_numeric() {
        let timeline = TimelineId::new(3).unwrap();
        let mut target = RecoveryTarget::latest(TargetAction::Promote);
        assert_eq!(target.settings(timeline), [("recovery_target_timeline", "3".to_owned())]);
        target.target = Target::Time("2026-11-20T10:15:00.25Z".parse().unwrap());
        target.inclusive = false;
        let settings = target.settings(timeline);
        assert_eq!(settings[1], ("recovery_target_time", "2026-11-20 10:15:00.250000+00".to_owned()));
        assert_eq!(settings[2], ("recovery_target_inclusive", "off".to_owned()));
        assert_eq!(settings[3], ("recovery_target_action", "promote".to_owned()));
    }
}
