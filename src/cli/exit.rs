//! Exit statuses: what a command's outcome tells a script, and PostgreSQL.
//!
//! The statuses are a contract (`docs/cli.md`). One command differs: PostgreSQL takes a restore_command's 1 to 125 as
//! *end of archive* and then promotes, so whatever is not a proven absence (a wrong option, a broken configuration
//! file, a panic) must leave `wal fetch` with 200, which stops recovery instead. A standby is the other way
//! round: 1 makes it ask again and 200 would shut it down.

use std::path::Path;

use crate::pg::STANDBY_SIGNAL;

/// What a failure means to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExitKind {
    /// It did not work.
    Failed,
    /// The command line is wrong.
    Usage,
    /// The configuration, or a file it names, is wrong.
    Configuration,
    /// Stored data is damaged, or nobody trusted vouches for it.
    Damaged,
    /// The store, or the server, does not answer.
    Unreachable,
    /// What was asked for is proven not to be there.
    Absent,
    /// Walden is at fault.
    Bug,
}

/// How outcomes become exit statuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitPolicy {
    /// 0 ok, 1 failed, 2 usage or configuration, 3 damaged or untrusted data, 4 store unreachable.
    Usual,
    /// `wal fetch` as PostgreSQL's restore_command: 0 restored, 1 absent, 200 anything else; 1 for a standby.
    RestoreCommand,
}

/// The status at which PostgreSQL stops recovery rather than ending it.
const STOP_RECOVERY: u8 = 200;
/// The status that PostgreSQL takes as the end of the archive, and a standby as "not yet".
const NOT_THERE: u8 = 1;

impl ExitKind {
    /// Every kind.
    const ALL: [Self; 7] = [
        Self::Failed,
        Self::Usage,
        Self::Configuration,
        Self::Damaged,
        Self::Unreachable,
        Self::Absent,
        Self::Bug,
    ];

    /// Returns the kind that [`ExitKind::name`] calls so.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Returns the word for JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::Configuration => "configuration",
            Self::Damaged => "damaged",
            Self::Unreachable => "unreachable",
            Self::Absent => "absent",
            Self::Bug => "bug",
        }
    }
}

impl ExitPolicy {
    /// Returns the status for an outcome; `Ok` is always 0.
    pub fn status(self, outcome: Result<(), ExitKind>) -> u8 {
        // PostgreSQL runs a restore_command in its data directory.
        let standby = self == Self::RestoreCommand && Path::new(STANDBY_SIGNAL).exists();
        self.status_where(outcome, standby)
    }

    fn status_where(self, outcome: Result<(), ExitKind>, standby: bool) -> u8 {
        match (self, outcome) {
            (_, Ok(())) => 0,
            (Self::Usual, Err(ExitKind::Failed | ExitKind::Absent | ExitKind::Bug)) => 1,
            (Self::Usual, Err(ExitKind::Usage | ExitKind::Configuration)) => 2,
            (Self::Usual, Err(ExitKind::Damaged)) => 3,
            (Self::Usual, Err(ExitKind::Unreachable)) => 4,
            (Self::RestoreCommand, Err(ExitKind::Absent)) => NOT_THERE,
            (Self::RestoreCommand, Err(_)) if standby => NOT_THERE,
            (Self::RestoreCommand, Err(_)) => STOP_RECOVERY,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [ExitKind; 7] = [
        ExitKind::Failed,
        ExitKind::Usage,
        ExitKind::Configuration,
        ExitKind::Damaged,
        ExitKind::Unreachable,
        ExitKind::Absent,
        ExitKind::Bug,
    ];

    fn statuses(policy: ExitPolicy, standby: bool) -> [u8; 7] {
        KINDS.map(|kind| policy.status_where(Err(kind), standby))
    }

    #[test]
    fn the_statuses_are_the_documented_ones() {
        assert_eq!(statuses(ExitPolicy::Usual, false), [1, 2, 2, 3, 4, 1, 1]);
        assert_eq!(statuses(ExitPolicy::Usual, true), [1, 2, 2, 3, 4, 1, 1]);
        assert_eq!(statuses(ExitPolicy::RestoreCommand, false), [200, 200, 200, 200, 200, 1, 200]);
        assert_eq!(statuses(ExitPolicy::RestoreCommand, true), [1; 7]);
        for policy in [ExitPolicy::Usual, ExitPolicy::RestoreCommand] {
            assert_eq!(policy.status_where(Ok(()), true), 0);
        }
    }
}
