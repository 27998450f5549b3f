//! Another host than the source's: what is refused, and what is warned of, by what the basebackup records.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::source::Source;
use crate::support::{Cluster, Need, Options, Run, Site, Walden, require};

/// A source whose records can be rewritten, because nobody has signed them.
struct Recorded {
    source: Source,
    record: Value,
    id: String,
}

impl Recorded {
    fn make() -> Self {
        let cluster = Cluster::start_with(15, Options::default().initdb("--wal-segsize=1"));
        let walden = Walden::configure(cluster.scratch(), &site(&cluster));
        cluster.set_archive_command(&walden.archive_command());
        let source = Source { cluster, walden };
        let id = source.backup();
        source.archive_wal();
        let mut recorded = Self { source, record: Value::Null, id };
        recorded.record = serde_json::from_slice(&fs::read(recorded.file()).unwrap()).unwrap();
        recorded
    }

    fn file(&self) -> std::path::PathBuf {
        self.source.walden.repository().join(format!("main/basebackups/{}/backup.json", self.id))
    }

    /// Plans a restore of a basebackup that records `changes` of its server.
    fn planned(&self, changes: &[(&str, Value)]) -> Run {
        let mut record = self.record.clone();
        for (name, value) in changes {
            record["server"][name] = value.clone();
        }
        fs::write(self.file(), format!("{record}\n")).unwrap();
        let directory = self.source.place("restored");
        let run = self.source.walden.try_run(&[
            "restore",
            &self.id,
            "--dry-run",
            "--target-dir",
            directory.to_str().unwrap(),
        ]);
        assert!(!directory.exists(), "{}", run.stderr);
        run
    }
}

fn site(cluster: &Cluster) -> Site {
    Site::of(cluster, cluster.data_directory()).unencrypted()
}

#[test]
fn another_architecture_is_refused_and_another_c_library_warned_of() {
    require!(Need::PostgreSQL(15));
    let recorded = Recorded::make();
    let same = recorded.planned(&[]).expect_success();
    assert!(!same.stderr.contains("may sort differently"), "{}", same.stderr);

    let library = recorded.planned(&[("libc", json!("2.3"))]).expect_success();
    assert!(library.stderr.contains("the source had libc 2.3 and this host has"), "{}", library.stderr);

    let architecture = recorded.planned(&[("platform", json!("linux s390x"))]).expect_code(1);
    assert!(architecture.stderr.contains("the source ran on linux s390x"), "{}", architecture.stderr);
    assert!(architecture.stderr.contains("hint: "), "{}", architecture.stderr);
}

/// Failure 27b where the basebackup was taken on a standby, or in a container, and the restore is beside the primary.
#[test]
fn a_tablespace_that_replay_would_make_over_something_is_refused_whatever_host_the_basebackup_names() {
    require!(Need::PostgreSQL(15));
    let recorded = Recorded::make();
    let source = &recorded.source;
    let place = source.scratch().folder("late");
    source.sql(&format!("create tablespace late location '{}'", place.display()));
    source.archive_wal();
    let elsewhere = [("host", json!("a-standby"))];
    let refused = |run: Run| {
        let run = run.expect_code(1);
        assert!(run.stderr.contains("recovery would create tablespace"), "{}", run.stderr);
    };
    refused(recorded.planned(&elsewhere));
    refused(recorded.planned(&[]));
    // Dropped since: the source has no tablespace any more, and the directory is another's.
    source.sql("drop tablespace late");
    source.archive_wal();
    recorded.planned(&[]).expect_success();
    recorded.planned(&elsewhere).expect_success();
    source.scratch().file("late/precious", "x");
    refused(recorded.planned(&[]));
    refused(recorded.planned(&elsewhere));
}

#[test]
fn programs_of_another_major_version_are_refused_and_missing_ones_warned_of() {
    require!(Need::PostgreSQL(15));
    let recorded = Recorded::make();
    let Source { cluster, walden } = &recorded.source;
    // The oldest that is still recorded by nobody: no host of a test has it.
    let missing = recorded.planned(&[("major", json!(12))]).expect_success();
    assert!(missing.stderr.contains("PostgreSQL 12 is not installed on this host"), "{}", missing.stderr);

    let folder = cluster.scratch().folder("programs");
    let program =
        cluster.scratch().file("programs/postgres", "#!/bin/sh\necho 'postgres (PostgreSQL) 13.22'\n");
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
    walden.reconfigure(cluster.scratch(), &site(cluster).bin_directory(&folder));
    let other = recorded.planned(&[]).expect_code(1);
    assert!(other.stderr.contains("13.22, and PostgreSQL 15 is needed"), "{}", other.stderr);
    assert!(other.stderr.contains("bin_directory"), "{}", other.stderr);
}
