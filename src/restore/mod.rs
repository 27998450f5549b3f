//! A basebackup written to disk: plan → checks → files, many packs at a time → recovery settings → pg_control.
//!
//! Nothing is written before the plan is made and the target is found fit ([`plan`], [`target`]). Until the last
//! rename the directory has neither `pg_control` nor `PG_VERSION`, so that no server starts on part of a cluster
//! (failure 27a); what is complete by then stands in a journal, and `--resume` goes on from there.
//! Deliberately absent: choosing the basebackup and the WAL of the recovery, which `catalog` does, and starting it.

pub mod destinations;
pub mod estimate;
pub mod plan;
pub mod target;

pub mod recovery_settings;

mod batch;
mod batches;
mod existing;
mod file_writer;
mod journal;
mod sample;
mod server;
pub mod settings_files;
mod shape;
mod writer;

pub mod run;

mod error;
#[cfg(test)]
mod tests;

pub use error::{Error, ErrorKind};
pub use estimate::{Estimate, Limit, Sample, Work, estimate};
pub use plan::{Existing, RecoveryMode, RestoreOptions, RestorePlan, plan_restore};
pub use run::{Resources, RestoreOutcome, restore};
pub use sample::{take_sample, work_of};
