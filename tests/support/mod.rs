//! What tests of the whole binary stand on: real PostgreSQL servers, a load on them, and a runner for `walden`.
//!
//! Each test binary is a folder with a `main.rs` that names this one by `#[path = "../support/mod.rs"] mod support;`.
//! A test says first what it needs (`require!`); everything it makes lives in a `Scratch`, which on drop
//! stops and unmounts whatever the test left there.
#![allow(dead_code, unused_imports, unused_macros, reason = "every test binary uses its own part of this")]

mod needs;
mod run;
mod scratch;
mod small_disk;

mod cluster;
mod debian;
mod server;
mod sql;

mod chaos;
mod checksum;
mod pgbench;
mod writers;

mod resting;
mod source;
mod walden;

pub mod repository;

mod giver;
mod line;
mod moto;
mod proxy;
mod s3;
mod s3_server;
mod test_store;

pub use chaos::{Chaos, Ledger};
pub use checksum::Checksums;
pub use cluster::{Cluster, Options};
pub use debian::DebianCluster;
pub use giver::{Giver, Mood, SESSION_KEYS};
pub use line::Line;
pub use moto::Moto;
pub use needs::{Need, bin_directory, missing, program, unmet};
pub use pgbench::Pgbench;
pub use proxy::{Fault, Proxy, header};
pub use resting::{Files, Resting, Taken, files_of};
pub use run::Run;
pub use s3::{RemoteS3, S3, s3_storage};
pub use s3_server::{BUCKET, SECRET_ACCESS_KEY};
pub use scratch::{Account, Scratch, mounts_below, open_fuse_to_users, processes_in, unmount};
pub use server::{Server, Stop};
pub use small_disk::{fill, small_disk};
pub use source::Source;
pub use sql::Sql;
pub use test_store::StoreKind;
pub use walden::{Mounted, Running, Site, Walden};
pub use writers::{Acknowledged, Draw, Writers};

/// Returns from the test, loudly, when something it needs is missing; under CI the test fails instead.
macro_rules! require {
    ($($need:expr),+ $(,)?) => {
        if $crate::support::unmet(&[$($need),+]) {
            return;
        }
    };
}
pub(crate) use require;

use std::time::{Duration, Instant};

/// How long anything may take that normally takes a moment: long enough that only a defect reaches it.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Waits until `ready` returns something, and panics with `what` when patience ends.
#[track_caller]
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
