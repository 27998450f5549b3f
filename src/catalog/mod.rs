//! What exists in a site: basebackups, WAL coverage, timelines, and what recovery needs of them.
//!
//! Everything is read from names and signed headers where that is enough, so that most questions need no private
//! key. Decisions are pure: a plan is made from lists, and the answer to one name from the plan and the store's word.
//! Deliberately absent: carrying anything out; `wal`, `mount` and `restore` ask here and act.

pub mod basebackups;
pub mod carried;
pub mod ending_segment;
pub mod host;
pub mod overview;
pub mod recoverable;
pub mod recovery_choice;
pub mod recovery_decision;
pub mod recovery_plan;
pub mod recovery_target;
pub mod recovery_window;
pub mod target_search;
#[cfg(test)]
mod tests;
pub mod timeline_tree;
pub mod wal_ahead;
pub mod wal_coverage;
pub mod wal_reader;
pub mod wal_records;
pub mod wal_scan;
pub mod window_ending;

pub use basebackups::{BasebackupList, ListedBasebackup, ResolveError};
pub use recovery_choice::{PlannedRecovery, RecoveryError, RecoveryRequest, plan_for_target};
pub use recovery_decision::{Decision, PlanError, Reach, TargetPlace, plan_recovery};
pub use recovery_plan::{Answer, InArchive, PLAN_FILE_NAME, RecoveryPlan, TimelineSpan, answer};
pub use recovery_target::{RecoveryTarget, Target, TargetAction};
pub use recovery_window::{Hole, Recoverability, RecoveryStart, RecoveryWindow, SegmentRange};
pub use timeline_tree::{Stretch, TimelineTree};
pub use wal_ahead::WalAhead;
pub use wal_coverage::{TimelineCoverage, WalCoverage};
pub use wal_reader::{Found, Patience, WalReader};
pub use window_ending::Ending;
