//! PostgreSQL on the writable mount: it starts from an upper with nothing in it, works, crashes and recovers.
//!
//! The lower is the folder of a cluster that was stopped. What is compared at the end is the whole database, with the
//! cluster copied and treated alike on the local file system.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use walden::disk::Owner;

use crate::folder_lower::FolderLower;
use crate::harness::{can_mount, skip};
use crate::writable::Writable;

/// A shell of the user postgres in a folder, with PostgreSQL's programs in its path.
struct Shell {
    programs: PathBuf,
    folder: PathBuf,
}

impl Shell {
    fn run(&self, script: &str) -> String {
        let path = format!("{}:/usr/bin:/bin", self.programs.display());
        let output = Command::new("runuser")
            .args(["-u", "postgres", "--", "env", "-i", &format!("PATH={path}"), "LC_ALL=C"])
            .args([&format!("PGHOST={}", self.folder.display()), "PGDATABASE=postgres"])
            .args(["bash", "-euo", "pipefail", "-c", script])
            .current_dir(&self.folder)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{script}\n{text}\n{}", String::from_utf8_lossy(&output.stderr));
        text
    }
}

/// Stops what still runs when a test fails: a server outlives its mount otherwise.
struct StopAtEnd<'a>(&'a Shell);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        for data in ["source", "mnt/data"] {
            let pg_ctl = self.0.programs.join("pg_ctl");
            let folder = self.0.folder.join(data);
            let _ = Command::new("runuser")
                .args(["-u", "postgres", "--"])
                .arg(pg_ctl)
                .args(["-w", "-m", "immediate", "stop", "-D"])
                .arg(folder)
                .output();
        }
    }
}

fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
    let mut found: Vec<PathBuf> = versions.map(|entry| entry.path().join("bin")).collect();
    found.retain(|path| path.join("initdb").exists() && path.join("pgbench").exists());
    found.sort();
    found.pop()
}

const START: &str = "pg_ctl -w -t 60 -l $PWD/log -o \"-c listen_addresses='' -k $PWD\" start -D";

/// Everything the database holds, in a form that compares.
const SUMS: &str = "psql -Atqc \"select count(*), sum(abalance), sum(hashtext(filler)::bigint) from pgbench_accounts\" \
     -c \"select count(*), sum(bbalance) from pgbench_branches\" -c \"select count(*), sum(delta) from pgbench_history\" \
     -c \"select bt_index_check(indexrelid, true) from pg_index join pg_class on oid = indexrelid where relam = 403 and \
     relpersistence = 'p'\" -c \"select count(*) from verify_heapam('pgbench_accounts')\"";

#[test]
fn postgresql_starts_from_nothing_works_crashes_and_recovers() {
    if !can_mount() {
        return;
    }
    let Some(programs) = programs().filter(|_| Owner::current().is_root()) else {
        skip("running PostgreSQL needs root and its programs in /usr/lib/postgresql");
        return;
    };
    let scratch = tempfile::Builder::new().prefix("walden-upper-").tempdir().unwrap();
    let user = nix::unistd::User::from_name("postgres").unwrap().unwrap();
    let owner = Owner { uid: user.uid.as_raw(), gid: user.gid.as_raw() };
    for name in ["", "mnt", "upper"] {
        let _ = std::fs::create_dir(scratch.path().join(name));
        owner.give(&scratch.path().join(name)).unwrap();
    }
    let shell = Shell { programs, folder: scratch.path().to_owned() };
    shell.run("initdb -D source -A trust --no-sync -k > /dev/null");
    shell.run(&format!("{START} source"));
    shell.run("pgbench -i -s 5 -q 2> /dev/null; psql -qc 'create extension amcheck'");
    shell.run("pgbench -n -c 2 -t 500 > /dev/null 2>&1; psql -qc 'create database other'");
    let sums = shell.run(SUMS);
    shell.run("pg_ctl -w -m fast stop -D source");

    let lower = Arc::new(FolderLower::new(&scratch.path().join("source")));
    let mut writable = Writable::mount(scratch.path(), lower.clone(), owner);
    let stop_at_end = StopAtEnd(&shell);
    shell.run(&format!("{START} mnt/data"));
    let fetched = lower.fetched_bytes.load(Ordering::Relaxed);
    let whole = size_of(&scratch.path().join("source"));
    assert!(fetched < whole / 3, "a start fetched {fetched} of {whole} bytes");
    assert_eq!(shell.run(SUMS), sums);
    shell.run(
        "pgbench -n -c 2 -t 500 > /dev/null 2>&1; psql -qc 'drop database other' -c 'create database third'",
    );
    shell.run(
        "psql -qc 'vacuum full pgbench_history' -c 'create table t as select generate_series(1, 100000)'",
    );
    shell.run("psql -qc 'checkpoint'; pgbench -n -c 2 -t 500 > /dev/null 2>&1; psql -qc 'truncate t'");
    let sums = shell.run(SUMS);
    shell.run("pg_ctl -w -m immediate stop -D mnt/data");
    // The mount goes too, and comes back from the upper alone.
    writable.remount();
    shell.run(&format!("{START} mnt/data"));
    assert_eq!(shell.run(SUMS), sums);
    assert_eq!(shell.run("psql -Atqc 'select count(*) from t'"), "0\n");
    shell.run("pg_ctl -w -m fast stop -D mnt/data");
    assert!(writable.upper().stats().fetches > 0);

    // The bare upper refuses to start (failure 27a).
    let refused = Command::new("runuser")
        .args(["-u", "postgres", "--"])
        .arg(shell.programs.join("postgres"))
        .args(["--single", "-D"])
        .arg(scratch.path().join("upper"))
        .output()
        .unwrap();
    assert!(!refused.status.success());
    drop(stop_at_end);
    writable.unmount();
}

fn size_of(folder: &Path) -> u64 {
    let output = Command::new("du").args(["-sb"]).arg(folder).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().parse().unwrap()
}
