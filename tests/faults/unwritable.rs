//! Folders that cannot be written: another user's, on a file system mounted read-only, on one that is full.
//!
//! Backup, restore and the making of a clone either have no use for the folder and succeed, or say which path it is and
//! why, with what to do; nothing half-done is taken for whole, and the same command works once the folder can be written.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::site::Faulted;
use crate::support::{Need, Run, require, wait_for};

/// What is wrong with a folder.
#[derive(Debug, Clone, Copy)]
enum Wrong {
    /// It is root's, with this mode, and Walden runs as user postgres.
    OfRoot(u32),
    /// It is on a file system that is mounted read-only.
    ReadOnly,
    /// It is on a file system without room.
    Full,
}

const WRONGS: [Wrong; 4] = [Wrong::OfRoot(0o755), Wrong::OfRoot(0o555), Wrong::ReadOnly, Wrong::Full];

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mount(arguments: &[&str], folder: &Path) {
    Run::of(Command::new("mount").args(arguments).arg(folder), "").expect_success();
}

impl Wrong {
    fn make(self, site: &Faulted, folder: &Path) {
        let text = folder.to_str().unwrap();
        match self {
            Self::OfRoot(mode) => {
                chown(folder, Some(0), Some(0)).unwrap();
                set_mode(folder, mode);
            }
            Self::ReadOnly => {
                mount(&["--bind", text], folder);
                mount(&["-o", "remount,bind,ro"], folder);
            }
            Self::Full => {
                mount(&["-t", "tmpfs", "-o", "size=16k,mode=0700", "full"], folder);
                site.scratch().account().own(folder);
                let filled = fs::write(folder.join("filler"), vec![1; 1 << 20]);
                assert_eq!(filled.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
            }
        }
    }

    fn heal(self, site: &Faulted, folder: &Path) {
        match self {
            Self::OfRoot(_) => {
                site.scratch().account().own(folder);
                set_mode(folder, 0o700);
            }
            Self::ReadOnly | Self::Full => {
                // A process that served a mount ends soon after it.
                let unmounted =
                    || Command::new("umount").arg(folder).stderr(Stdio::null()).status().unwrap().success();
                wait_for("the folder to be unused", || unmounted().then_some(()));
            }
        }
    }
}

/// A folder that cannot be written until this is dropped, whatever a test finds meanwhile.
struct Made<'a> {
    wrong: Wrong,
    site: &'a Faulted,
    folder: &'a Path,
}

impl<'a> Made<'a> {
    fn new(wrong: Wrong, site: &'a Faulted, folder: &'a Path) -> Self {
        wrong.make(site, folder);
        Self { wrong, site, folder }
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        self.wrong.heal(self.site, self.folder);
    }
}

/// What is run with a folder that cannot be written, and what that has to say.
struct Refusal<'a> {
    wrong: Wrong,
    folder: &'a Path,
    arguments: &'a [&'a str],
    code: i32,
    reason: &'a str,
}

impl Refusal<'_> {
    /// Runs it; `then` looks at what is there before the folder is put right.
    #[track_caller]
    fn check(&self, site: &Faulted, then: impl Fn()) {
        let made = Made::new(self.wrong, site, self.folder);
        let run = site.walden.try_run(self.arguments);
        then();
        drop(made);
        let what =
            format!("{:?} with {:?} {}: {}", self.arguments, self.wrong, self.folder.display(), run.stderr);
        assert_eq!(run.code(), Some(self.code), "{what}");
        let [error, hint] = ["error: ", "hint: "].map(|start| {
            run.stderr
                .lines()
                .find(|line| line.starts_with(start))
                .unwrap_or_else(|| panic!("no {start} {what}"))
        });
        let name = self.folder.file_name().unwrap().to_str().unwrap();
        assert!(error.contains(name) && error.contains(self.reason), "{what}");
        assert!(!error.contains("damaged") && hint.len() > "hint: ".len() + 10, "{what}");
    }
}

#[test]
fn a_target_that_cannot_be_written_is_refused_and_nothing_is_left_in_it() {
    require!(Need::PostgreSQL(15), Need::Root);
    let site = Faulted::start(|_, site| site);
    site.archive();
    site.walden.run(&["backup"]);
    site.archive_wal();
    let places = site.scratch().folder("places");
    let target = places.join("restored");
    let restore = ["restore", "--target-dir", target.to_str().unwrap()];
    let reasons = ["Permission denied", "Permission denied", "Read-only file system", "bytes free"];
    for (wrong, reason) in WRONGS.into_iter().zip(reasons) {
        let refusal = Refusal { wrong, folder: &places, arguments: &restore, code: 1, reason };
        refusal.check(&site, || assert!(!target.exists(), "{wrong:?}"));
    }
    // The directory itself: another user's, or not to be written.
    let own = site.scratch().folder("places/own");
    let into_own = ["restore", "--target-dir", own.to_str().unwrap()];
    for (wrong, reason) in [
        (WRONGS[0], "belongs to user 0"),
        (WRONGS[1], "belongs to user 0"),
        (Wrong::ReadOnly, "Read-only file system"),
    ] {
        let refusal = Refusal { wrong, folder: &own, arguments: &into_own, code: 1, reason };
        refusal.check(&site, || assert_eq!(fs::read_dir(&own).unwrap().count(), 0, "{wrong:?}"));
    }
    site.walden.run(&into_own);
    site.assert_restores("latest");
}

#[test]
fn a_clones_folder_that_cannot_be_written_is_refused_and_no_clone_is_there() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Fuse, Need::Program("fusermount3"));
    let site = Faulted::start(|_, site| site);
    site.archive();
    site.walden.run(&["backup"]);
    site.archive_wal();
    let clones = site.scratch().path().join("walden/clones");
    let create = ["clone", "create", "one"];
    let clones_listed = || site.walden.json(&["clone", "list"])["clones"].as_array().map(Vec::len).unwrap();
    let reasons =
        [(2, "belongs to user 0"), (2, "belongs to user 0"), (1, "Read-only"), (1, "No space left")];
    for (wrong, (code, reason)) in WRONGS.into_iter().zip(reasons) {
        let refusal = Refusal { wrong, folder: &clones, arguments: &create, code, reason };
        refusal.check(&site, || assert_eq!(clones_listed(), 0, "{wrong:?}"));
        assert_eq!(fs::read_dir(&clones).unwrap().count(), 0, "{wrong:?}");
    }
    site.walden.run(&create);
    let rows = ["clone", "psql", "one", "--", "-XAtc", "select count(*) from kept"];
    assert_eq!(site.walden.run(&rows).stdout.trim(), "20000");
    site.walden.run(&["clone", "delete", "one"]);
}

/// What a basebackup goes to: the repository's own disk being full is `full_disk`'s.
#[test]
fn a_repository_that_cannot_be_written_takes_no_basebackup_and_can_be_restored_from() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Folder);
    let site = Faulted::start(|_, site| site);
    site.archive();
    site.walden.run(&["backup"]);
    site.archive_wal();
    let before = site.listed();
    let basebackups = site.walden.repository().join("main/basebackups");
    let reasons = ["Permission denied", "Permission denied", "Read-only file system"];
    for (n, (wrong, reason)) in WRONGS.into_iter().zip(reasons).enumerate() {
        let refusal = Refusal { wrong, folder: &basebackups, arguments: &["backup"], code: 2, reason };
        let target = site.scratch().path().join(format!("restored-{n}"));
        refusal.check(&site, || {
            assert_eq!(site.listed(), before, "{wrong:?}");
            site.walden.run(&["restore", "--target-dir", target.to_str().unwrap()]);
        });
        assert!(target.join("PG_VERSION").exists());
    }
    site.walden.run(&["backup"]);
    assert_eq!(site.listed().len(), before.len() + 1);
}

/// Restore and clones remember nothing between runs, a basebackup is full and says that the next one stores more than it
/// would; a mount begins a log there, and does without its lines.
#[test]
fn a_state_folder_that_cannot_be_written_stops_only_what_needs_it() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Fuse, Need::Program("fusermount3"));
    let site = Faulted::start(|_, site| site);
    site.archive();
    site.walden.run(&["backup"]);
    let state = site.scratch().path().join("walden/state");
    let point = site.scratch().folder("mounted");
    let mount = ["mount", point.to_str().unwrap()];
    let others_work = |n: usize| {
        let target = site.scratch().path().join(format!("restored-{n}"));
        let backup = site.walden.run(&["backup"]);
        assert!(backup.stderr.contains("WARN") && backup.stderr.contains("next one"), "{}", backup.stderr);
        assert!(backup.stdout.contains("full: "), "{}", backup.stdout);
        site.walden.run(&["restore", "--target-dir", target.to_str().unwrap()]);
        site.walden.run(&["clone", "create", "one"]);
        site.walden.run(&["clone", "delete", "one"]);
    };
    let reasons = [(2, "belongs to user 0"), (2, "belongs to user 0"), (1, "Read-only")];
    for (n, (wrong, (code, reason))) in WRONGS.into_iter().zip(reasons).enumerate() {
        let refusal = Refusal { wrong, folder: &state, arguments: &mount, code, reason };
        refusal.check(&site, || {
            others_work(n);
            assert_eq!(fs::read_dir(&point).unwrap().count(), 0, "{wrong:?} is mounted");
        });
    }
    let full = Made::new(Wrong::Full, &site, &state);
    others_work(WRONGS.len());
    drop(site.walden.mount(&point));
    drop(full);
    drop(site.walden.mount(&point));
    assert_eq!(site.listed().len(), 1 + WRONGS.len());
    // The state of the first one is as it was, and so is that basebackup.
    let first = site.listed().into_iter().min().unwrap();
    assert_eq!(site.walden.json(&["backup"])["parent"], first.as_str());
}
