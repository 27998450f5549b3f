//! The store away while a clone recovers, runs and stops: it is waited for, then missed with an error, and nothing of
//! the clone is lost, promoted early or left waiting.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::processes::Processes;
use crate::site::{Clone, Source, is_alive};
use crate::support::{Need, Options, Running, Sql, require, wait_for};
use crate::terminated::{Supervisor, assert_ended};

/// A folder of the repository that cannot be read: it leads to itself, which fails for everyone, root too, and says
/// nothing of what is in it.
struct Hidden {
    folder: PathBuf,
}

impl Hidden {
    fn new(folder: PathBuf) -> Self {
        fs::rename(&folder, folder.with_extension("hidden")).unwrap();
        symlink(folder.file_name().unwrap(), &folder).unwrap();
        Self { folder }
    }

    fn show(self) {
        fs::remove_file(&self.folder).unwrap();
        fs::rename(self.folder.with_extension("hidden"), &self.folder).unwrap();
    }
}

/// A source, and a clone of it that has not been started.
struct Scene {
    source: Source,
    clone: Clone,
}

impl Scene {
    fn new(name: &str) -> Self {
        let source = Source::start(Options::default());
        // A call to a server is tried again by itself, and would be for minutes before anything else is seen.
        let configuration = fs::read_to_string(source.walden.configuration_file()).unwrap();
        let impatient = configuration.replace("[storage]\n", "[storage]\nretry = \"1s\"\n");
        fs::write(source.walden.configuration_file(), impatient).unwrap();
        source.sql("create table changed as select n from generate_series(1, 1000) n");
        // Too large to share a chunk with what is read.
        for table in ["cold", "colder"] {
            source.sql(&format!("create table {table} as select n from generate_series(1, 20000) n"));
        }
        // Redo of a change to a page that is all-visible reads the visibility map, of which the WAL has no image.
        source.sql("vacuum changed");
        source.backup_at_rest();
        source.sql("delete from changed where n = 1");
        source.archive_wal();
        // What nobody has read is to be missed.
        let clone = source.clone(name, &["--no-start", "--no-hydrate"]);
        Self { source, clone }
    }

    /// The WAL archive.
    fn archive(&self) -> PathBuf {
        self.source.walden.repository().join("main/clusters")
    }

    /// The packs of the basebackup.
    fn packs(&self) -> PathBuf {
        let id = self.clone.status()["basebackup"].as_str().unwrap().to_owned();
        self.source.walden.repository().join("main/basebackups").join(id).join("packs")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.clone.folder().join("mount.log")).unwrap_or_default()
    }

    /// Counts what waits, or has waited, for an object with this in its key.
    fn waits(&self, object: &str) -> usize {
        let log = self.log();
        log.lines().filter(|line| line.contains("waiting for the store") && line.contains(object)).count()
    }

    /// Starts the clone and waits until its recovery waits for the archive, which it cannot see.
    #[track_caller]
    fn start_without_archive(&self) -> (Running, Hidden) {
        let archive = Hidden::new(self.archive());
        let starting = self.clone.walden.start(&["clone", "start", &self.clone.name]);
        wait_for("recovery to wait for the archive", || (self.waits("") > 0).then_some(()));
        (starting, archive)
    }

    #[track_caller]
    fn assert_no_panic(&self) {
        let log = fs::read_to_string(self.clone.folder().join("server.log")).unwrap();
        assert!(!log.contains("PANIC"), "{log}");
    }
}

#[track_caller]
fn succeeds(mut starting: Running) {
    let status = wait_for("the clone to be started", || starting.process.try_wait().unwrap());
    assert!(status.success(), "{status}");
}

/// Design 4, *Failure rules*: wait in recovery, an error after a deadline later; no PANIC; a stop comes to its end.
#[test]
fn a_clone_waits_for_the_store_while_it_recovers_and_misses_it_with_an_error_later() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let scene = Scene::new("away");
    let (starting, archive) = scene.start_without_archive();
    let packs = Hidden::new(scene.packs());
    archive.show();
    wait_for("recovery to wait for a page", || (scene.waits("/packs/") > 2).then_some(()));
    assert_eq!(scene.clone.state(), "recovering");
    packs.show();
    succeeds(starting);
    assert_eq!(scene.clone.sql("select count(*) from changed"), "999");

    assert_shared_files_are_local(&scene.clone);
    let write = "create role one; comment on role one is 'x'; select txid_status('3'::bigint); drop role one";
    scene.clone.sql(write);
    let packs = Hidden::new(scene.packs());
    let missed = scene.clone.try_sql("select sum(n) from cold").unwrap_err();
    assert!(missed.contains("Input/output error"), "{missed}");
    scene.clone.sql(write);
    scene.clone.sql("insert into changed values (1); checkpoint");
    packs.show();
    assert_eq!(scene.clone.sql("select sum(n) from cold"), "200010000");
    scene.assert_no_panic();

    let packs = Hidden::new(scene.packs());
    let waited = scene.waits("/packs/");
    let colder = Sql::clone(&scene.clone);
    let reader = thread::spawn(move || colder.try_sql("select sum(n) from colder"));
    wait_for("a reader to wait for a page", || (scene.waits("/packs/") > waited).then_some(()));
    scene.clone.run("stop");
    assert_eq!(scene.clone.state(), "stopped");
    assert!(reader.join().unwrap().is_err());
    scene.assert_no_panic();
    packs.show();
    scene.clone.run("start");
    assert_eq!(scene.clone.sql("select sum(n) from colder"), "200010000");
    assert_eq!(scene.clone.sql("select count(*) from changed"), "1000");
    scene.clone.run("delete");
}

/// What PostgreSQL reads in critical sections is there before anybody is let in, asked for or not.
#[track_caller]
fn assert_shared_files_are_local(clone: &Clone) {
    let (mounted, upper) = (clone.folder().join("mnt/data"), clone.folder().join("upper/data"));
    let mut files = 0;
    for directory in ["global", "pg_xact", "pg_multixact/members", "pg_multixact/offsets", "pg_commit_ts"] {
        for entry in fs::read_dir(mounted.join(directory)).unwrap().flatten() {
            let size = entry.metadata().unwrap().len();
            // Walden's private area has this one.
            if entry.file_name() == "pg_control" || size == 0 {
                continue;
            }
            let local = upper.join(directory).join(entry.file_name());
            let on_disk = fs::metadata(&local).map_or(0, |local| local.blocks() * 512);
            assert!(on_disk >= size, "{} has {on_disk} of {size} bytes", local.display());
            files += 1;
        }
    }
    assert!(files > 40, "{files} files");
}

#[test]
fn a_recovery_that_waits_for_the_store_ends_when_its_supervisor_is_told_to() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let scene = Scene::new("told");
    for folder in [scene.archive(), scene.packs()] {
        let supervisor = Supervisor::start(&scene.clone);
        // What is needed before there is a recovery has come by then.
        wait_for("the server to be started", || Processes::of(&scene.clone).postmaster);
        let hidden = Hidden::new(folder);
        supervisor.terminate();
        supervisor.terminate();
        let status = supervisor.wait();
        assert_eq!(status.code(), Some(0), "{status}");
        assert_ended(&scene.clone);
        hidden.show();
    }
    let (archive, waited) = (Hidden::new(scene.archive()), scene.waits(""));
    let supervisor = Supervisor::start(&scene.clone);
    wait_for("recovery to wait for the archive", || (scene.waits("") > waited).then_some(()));
    supervisor.terminate();
    let status = supervisor.wait();
    assert_eq!(status.code(), Some(0), "{status}");
    assert_ended(&scene.clone);
    archive.show();
    scene.clone.run("start");
    assert_eq!(scene.clone.sql("select count(*) from changed"), "999");
    scene.assert_no_panic();
    scene.clone.run("delete");
}

#[test]
fn a_recovery_that_ended_without_the_store_starts_again_with_it() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let scene = Scene::new("again");
    let (starting, archive) = scene.start_without_archive();
    let site = Hidden::new(scene.source.walden.repository().join("main"));
    kill_restore_command(&scene.clone.folder());
    let again = "recovery starts again when the store answers";
    wait_for("the supervisor to miss the store", || scene.log().contains(again).then_some(()));
    let status = scene.clone.status();
    assert_eq!(status["state"], "recovering", "{status}");
    assert!(status["message"].as_str().unwrap().contains(again), "{status}");
    assert_eq!(status["server_pid"], serde_json::Value::Null);
    site.show();
    archive.show();
    succeeds(starting);
    assert_eq!(scene.clone.sql("select count(*) from changed"), "999");
    assert_eq!(scene.clone.status()["message"], serde_json::Value::Null);
    scene.clone.run("delete");
}

/// Kills the restore_command of a clone that waits: recovery ends of it.
#[track_caller]
fn kill_restore_command(folder: &Path) {
    let archive = folder.join("mnt/wal").display().to_string();
    let runs = |process: &Path| {
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        let command = fs::read_to_string(process.join("cmdline")).unwrap_or_default();
        ["sh\n", "cp\n"].contains(&name.as_str()) && command.contains(&archive)
    };
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let mut killed: Vec<Pid> = processes
        .filter(|process| runs(process))
        .map(|process| Pid::from_raw(process.file_name().unwrap().to_str().unwrap().parse().unwrap()))
        .collect();
    assert!(!killed.is_empty(), "no restore_command runs");
    // The shell is the elder: it must not go on when its child is gone.
    killed.sort();
    for process in &killed {
        let _ = kill(*process, Signal::SIGKILL);
    }
    wait_for("the restore_command to end", || {
        (!killed.iter().any(|process| is_alive(*process))).then_some(())
    });
}
