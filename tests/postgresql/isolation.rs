//! A server that replays somebody else's CREATE TABLESPACE on the host where that somebody runs (failure 27b).
//!
//! The source has a tablespace from before the basebackup and one from after; the clone runs beside it in each of the
//! ways `instance` knows to keep it to its own directories.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use walden::backup::{BackupSession, Checkpoint, StartOptions};
use walden::instance::{landlock, mount_namespace};
use walden::replication::ConnectOptions;

use crate::session::runtime;
use crate::support::{Account, Checksums, Cluster, Need, Run, Sql, require, wait_for};

/// How the clone is kept to its own directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    MountNamespace,
    UserNamespace,
    Landlock,
}

#[test]
fn a_clone_of_13_leaves_the_sources_tablespaces_alone() {
    leaves_tablespaces_alone(13, Way::MountNamespace);
}

#[test]
fn a_clone_of_15_leaves_the_sources_tablespaces_alone() {
    leaves_tablespaces_alone(15, Way::MountNamespace);
}

#[test]
fn a_clone_of_18_leaves_the_sources_tablespaces_alone() {
    leaves_tablespaces_alone(18, Way::MountNamespace);
}

#[test]
fn a_clone_of_an_ordinary_user_leaves_the_sources_tablespaces_alone() {
    leaves_tablespaces_alone(15, Way::UserNamespace);
}

/// A directory's files: name to mode, size, time of change and content.
type Listing = BTreeMap<PathBuf, (u32, u64, i64, Vec<u8>)>;

fn listing(folder: &Path) -> Listing {
    let mut found = Listing::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let content = if metadata.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            if metadata.is_dir() {
                folders.push(path.clone());
            }
            let changed = metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec();
            found.insert(path, (metadata.mode(), metadata.len(), changed, content));
        }
    }
    found
}

/// A source with two tablespaces, and the folders of a clone of it that waits to recover.
struct Pair {
    source: Cluster,
    tablespaces: [PathBuf; 2],
    stand_ins: [PathBuf; 2],
    data_directory: PathBuf,
    run_directory: PathBuf,
}

impl Pair {
    fn new(major: u32) -> Self {
        let source = Cluster::start(major);
        let folder = |name: &str| source.scratch().folder(name);
        let archive = folder("archive");
        source.set_archive_command(&format!("cp %p {}/%f", archive.display()));
        let tablespaces = [folder("before"), folder("after")];
        let stand_ins = [folder("clone-before"), folder("clone-after")];
        let (data_directory, run_directory) = (folder("clone"), folder("clone-run"));
        source.sql(&format!("create tablespace before location '{}'", tablespaces[0].display()));
        source.sql(
            "create table old tablespace before as select n, md5(n::text) from generate_series(1, 5000) n",
        );
        let stopped = runtime().block_on(async {
            let start = StartOptions { checkpoint: Checkpoint::Fast, label: "pair".into() };
            let running =
                BackupSession::start(&ConnectOptions::new(source.connection()), start).await.unwrap();
            copy(source.data_directory(), &data_directory);
            copy(&tablespaces[0], &stand_ins[0]);
            running.stop().await.unwrap()
        });
        for left in ["postmaster.pid", "postmaster.opts"] {
            fs::remove_file(data_directory.join(left)).unwrap();
        }
        fs::remove_dir_all(data_directory.join("pg_wal")).unwrap();
        let made = source.scratch();
        made.folder("clone/pg_wal");
        made.file("clone/backup_label", &stopped.backup_label);
        made.file("clone/recovery.signal", "");
        source.sql(&format!("create tablespace after location '{}'", tablespaces[1].display()));
        source.sql(
            "create table young tablespace after as select n, md5(n::text) from generate_series(1, 5000) n",
        );
        source.sql("update old set n = -n where n % 2 = 0; checkpoint");
        source.archive_wal();
        Self { source, tablespaces, stand_ins, data_directory, run_directory }
    }

    fn stand_ins(&self) -> Vec<(PathBuf, PathBuf)> {
        self.tablespaces.iter().cloned().zip(self.stand_ins.iter().cloned()).collect()
    }

    fn writable(&self) -> Vec<PathBuf> {
        vec![self.data_directory.clone(), self.run_directory.clone()]
    }

    fn clone_sql(&self) -> Sql {
        Sql::at(&self.run_directory, self.source.port)
    }

    fn command(&self) -> Command {
        let archive = self.source.scratch().path().join("archive");
        let mut command = Account::of_postgresql().command(self.source.bin_directory().join("postgres"));
        command.arg("-D").arg(&self.data_directory);
        for setting in [
            "listen_addresses=".to_owned(),
            "archive_mode=off".to_owned(),
            "hot_standby=off".to_owned(),
            "recovery_target_action=promote".to_owned(),
            format!("port={}", self.source.port),
            format!("unix_socket_directories={}", self.run_directory.display()),
            format!("restore_command=cp {}/%f %p", archive.display()),
        ] {
            command.arg("-c").arg(setting);
        }
        let log = fs::File::create(self.source.scratch().path().join("clone.log")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command
    }

    fn log(&self) -> String {
        fs::read_to_string(self.source.scratch().path().join("clone.log")).unwrap()
    }

    fn spawn(&self, way: Way) -> Child {
        let (writable, stand_ins) = (self.writable(), self.stand_ins());
        let mut command = self.command();
        if way == Way::MountNamespace {
            // A child inherits the view of the thread that makes it.
            return std::thread::scope(|scope| {
                let spawn = move || {
                    mount_namespace::enter(&writable, &stand_ins).unwrap();
                    command.spawn().unwrap()
                };
                scope.spawn(spawn).join().unwrap()
            });
        }
        let confine = move || {
            // Who was root a moment ago may not write its own uid_map; an ordinary user never was.
            nix::sys::prctl::set_dumpable(true)?;
            let confined = match way {
                Way::Landlock => landlock::restrict(&writable),
                _ => mount_namespace::enter(&writable, &stand_ins).map_err(std::io::Error::other),
            };
            // Only the number of an error would reach the parent.
            confined.inspect_err(|error| eprintln!("{error}"))
        };
        // SAFETY: the closure runs in a process of one thread, the uid already changed; glibc's allocator is usable
        // after a fork.
        #[allow(unsafe_code, reason = "a user namespace takes a process of one thread")]
        unsafe {
            command.pre_exec(confine);
        }
        command.spawn().unwrap()
    }
}

fn copy(from: &Path, to: &Path) {
    let mut command = Account::of_postgresql().command("cp");
    Run::of(command.arg("-a").arg(format!("{}/.", from.display())).arg(to), "").expect_success();
}

fn leaves_tablespaces_alone(major: u32, way: Way) {
    require!(Need::PostgreSQL(major));
    if way == Way::MountNamespace {
        require!(Need::Root);
    }
    let pair = Pair::new(major);
    let files = pair.tablespaces.each_ref().map(|folder| listing(folder));
    let rows = Checksums::of(&pair.source);
    let mut postmaster = pair.spawn(way);
    let clone = pair.clone_sql();
    wait_for("the clone to let somebody in", || {
        let ended = postmaster.try_wait().unwrap();
        assert!(ended.is_none(), "the clone ended with {ended:?}:\n{}", pair.log());
        clone.answers().then_some(())
    });
    rows.assert_same(&Checksums::of(&clone));
    // What a user may do next: change the rows, add some, drop the newer tablespace.
    clone.sql(
        "update old set n = n + 1; insert into young select n from generate_series(1, 20000) n; checkpoint",
    );
    clone.sql("drop table young; checkpoint");
    clone.sql("drop tablespace after");
    kill(Pid::from_raw(postmaster.id() as i32), Signal::SIGINT).unwrap();
    assert!(postmaster.wait().unwrap().success());
    rows.assert_same(&Checksums::of(&pair.source));
    for (folder, before) in pair.tablespaces.iter().zip(&files) {
        assert!(*before == listing(folder), "{} has changed", folder.display());
        let mode = fs::metadata(folder).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }
    assert!(!listing(&pair.stand_ins[0]).is_empty(), "the clone's rows are in the clone's folder");
}

#[test]
fn where_writes_can_only_be_forbidden_replay_of_a_tablespace_stops_and_harms_nothing() {
    require!(Need::PostgreSQL(15));
    let pair = Pair::new(15);
    let files = pair.tablespaces.each_ref().map(|folder| listing(folder));
    let mut postmaster = pair.spawn(Way::Landlock);
    let status = wait_for("recovery to stop", || postmaster.try_wait().unwrap());
    assert!(!status.success() && !pair.clone_sql().answers());
    assert!(pair.log().contains("FATAL"), "{}", pair.log());
    for (folder, before) in pair.tablespaces.iter().zip(&files) {
        assert!(*before == listing(folder), "{} has changed", folder.display());
    }
}
