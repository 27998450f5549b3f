//! A source whose instant restores answer beside it, and such a restore as a test holds it: told by its directory alone.
//!
//! A restored server has the configuration of its source, so that one says where its sockets are; the source itself is
//! told on its command line. What is beneath a mount is seen through a bind mount of the test's folder, which has only that.
//! A restore is driven as a DBA does: `walden restore`, `pg_ctl`, `kill`.

use std::ffi::CString;
use std::fs;
use std::ops::Deref;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::source::{Source, wait_until_writable};
use crate::support::{
    Account, Options, Pgbench, Run, Sql, Walden, bin_directory, mounts_below, processes_in, unmount, wait_for,
};

/// The port of a configuration that names none.
const PORT: u16 = 5432;
/// What an area is called while it is one, and until it is removed.
const AREA_NAMES: [&str; 2] = [".walden", "pgsql_tmp.walden"];

/// Where the folder of a test is seen without its mounts.
const BENEATH: &str = "beneath";

/// A source, and where its restored servers have their sockets.
pub struct Scene {
    pub source: Source,
    sockets: PathBuf,
    walden: Walden,
}

/// What keeps a basebackup in the store: pins and leases that have no end yet, and all there have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holds {
    pub pins: usize,
    pub open_pins: usize,
    pub open_leases: usize,
}

/// Which processes are killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    Supervisor,
    Postmaster,
    Both,
    /// All of them, and the mounts are gone as well.
    Host,
}

impl Scene {
    #[track_caller]
    pub fn start(options: Options) -> Self {
        Self::start_major(15, options)
    }

    #[track_caller]
    pub fn start_major(major: u32, options: Options) -> Self {
        let source = Source::start_major(major, options);
        let sockets = source.scratch().folder("sockets");
        let conf = source.data_directory().join("postgresql.conf");
        let own = format!("\nunix_socket_directories = '{}'\nlisten_addresses = ''\n", sockets.display());
        fs::write(&conf, fs::read_to_string(&conf).unwrap() + &own).unwrap();
        let walden = source.walden.as_root();
        Self { source, sockets, walden }
    }

    /// A source of some 60 MiB, with a table that nobody touches, and what came after its basebackup.
    #[track_caller]
    pub fn filled(options: Options) -> Self {
        Self::filled_major(15, options)
    }

    #[track_caller]
    pub fn filled_major(major: u32, options: Options) -> Self {
        let scene = Self::start_major(major, options);
        Pgbench::initialize(&scene.source, 2);
        scene.fill()
    }

    /// Adds that table, takes the basebackup, and adds what comes after it.
    #[track_caller]
    pub fn fill(self) -> Self {
        let source = &self.source;
        source.sql("create table cold as select n, md5(n::text) as t from generate_series(1, 200000) n");
        source.sql("create index on cold (t); checkpoint");
        source.backup();
        source.sql("create table later as select n from generate_series(1, 1000) n");
        source.archive_wal();
        self
    }

    /// Has PostgreSQL's own account restore.
    pub fn by_owner(mut self) -> Self {
        self.walden = self.source.walden.clone();
        self
    }

    /// Who restores: root, whose mounts pass through, unless another was named.
    pub fn walden(&self) -> Walden {
        self.walden.clone()
    }

    /// Where a restored server answers.
    pub fn sql(&self) -> Sql {
        Sql::at(&self.sockets, PORT)
    }

    /// Names a restore into a directory that is not there yet.
    pub fn place(&self, name: &str) -> Restored<'_> {
        self.at(self.source.place(name))
    }

    /// Names a restore into a directory.
    pub fn at(&self, directory: PathBuf) -> Restored<'_> {
        Restored { scene: self, directory, sql: self.sql() }
    }

    /// Restores without the background's help, until the server takes queries: it stays unfinished.
    #[track_caller]
    pub fn answering(&self, name: &str, options: &[&str]) -> (Restored<'_>, Value) {
        let restored = self.place(name);
        let report = restored.begin(&[&["--no-hydrate"], options].concat());
        (restored, report)
    }

    /// Waits until nothing keeps the basebackup any more, after the word that all of it is local.
    #[track_caller]
    pub fn wait_until_let_go(&self) {
        wait_for("the pin to end", || (self.holds().open_pins == 0).then_some(()));
        assert_eq!(self.holds().open_leases, 0);
    }

    /// Counts what keeps basebackups there.
    pub fn holds(&self) -> Holds {
        let site = self.source.walden.repository().join("main");
        let pins: Vec<PathBuf> = files_below(&site.join("pins"));
        let ended = pins.iter().filter(|path| path.extension().is_some_and(|it| it == "end")).count();
        let leases = files_below(&site.join("leases"));
        let rows: std::collections::BTreeSet<&Path> =
            leases.iter().filter_map(|path| path.parent()).collect();
        let open_leases = rows.iter().filter(|row| !row.join("end").exists()).count();
        Holds { pins: pins.len() - ended, open_pins: pins.len() - 2 * ended, open_leases }
    }

    /// Lets the test see what is beneath the mounts in its folder.
    #[track_caller]
    pub fn beneath(&self) -> Beneath {
        let folder = self.source.scratch().path().to_owned();
        let at = self.source.scratch().folder(BENEATH);
        let none: Option<&str> = None;
        mount(Some(&folder), &at, none, MsFlags::MS_BIND, none).unwrap();
        // Else what is mounted later would be seen there too.
        mount(none, &at, none, MsFlags::MS_PRIVATE, none).unwrap();
        Beneath { folder, at }
    }
}

/// The test's folder without what is mounted in it.
pub struct Beneath {
    folder: PathBuf,
    at: PathBuf,
}

impl Beneath {
    pub fn path(&self, path: &Path) -> PathBuf {
        self.at.join(path.strip_prefix(&self.folder).expect("it is in the test's folder"))
    }
}

/// A directory into which a cluster is restored at once; a test that fails leaves it to its scratch folder.
pub struct Restored<'a> {
    scene: &'a Scene,
    pub directory: PathBuf,
    sql: Sql,
}

impl Deref for Restored<'_> {
    type Target = Sql;

    fn deref(&self) -> &Sql {
        &self.sql
    }
}

impl Restored<'_> {
    fn text(&self) -> &str {
        self.directory.to_str().unwrap()
    }

    fn words<'w>(&'w self, first: &[&'w str], options: &[&'w str]) -> Vec<&'w str> {
        [first, &["--target-dir", self.text()], options].concat()
    }

    /// Restores, and waits until the command ends.
    #[track_caller]
    pub fn begin(&self, options: &[&str]) -> Value {
        self.scene.walden().json(&self.words(&["restore", "--instant"], options))
    }

    /// Tries to restore.
    #[track_caller]
    pub fn try_begin(&self, options: &[&str]) -> Run {
        self.scene.walden().try_run(&self.words(&["restore", "--instant"], options))
    }

    /// Goes on, and waits until the command ends.
    #[track_caller]
    pub fn resume(&self) -> Value {
        self.scene.walden().json(&self.words(&["restore", "--resume"], &[]))
    }

    /// Ends it where it is served, and goes on as fast as it comes, until it is plain.
    #[track_caller]
    pub fn finish(&self) -> Value {
        if let Some(supervisor) = self.supervisor() {
            kill(supervisor, Signal::SIGTERM).unwrap();
            wait_for("the supervisor to end", || self.supervisor().is_none().then_some(()));
            assert!(self.mounts().is_empty(), "a mount is left");
        }
        let words = self.words(&["restore", "--resume"], &["--hydrate-rate", "none"]);
        let report = self.scene.walden().json(&words);
        assert_eq!(word(&report, "state"), "plain");
        report
    }

    #[track_caller]
    pub fn try_resume(&self) -> Run {
        self.scene.walden().try_run(&self.words(&["restore", "--resume"], &[]))
    }

    /// Begins, or goes on, with a command that stays in the foreground of somebody else.
    #[track_caller]
    pub fn begin_beside(&self, options: &[&str]) -> Beside {
        Beside::start(&self.scene.walden(), &self.words(&["restore", "--instant"], options))
    }

    #[track_caller]
    pub fn resume_beside(&self, options: &[&str]) -> Beside {
        Beside::start(&self.scene.walden(), &self.words(&["restore", "--resume"], options))
    }

    /// Waits until the server takes writes, unless the command beside it ends in failure first.
    #[track_caller]
    pub fn wait_until_writable(&self, beside: &mut Beside) {
        wait_for("the restored server to take writes", || {
            beside.assert_no_failure();
            self.try_sql("select pg_is_in_recovery()").is_ok_and(|answer| answer == "f").then_some(())
        });
    }

    /// The mounts over the directory and in it.
    pub fn mounts(&self) -> Vec<PathBuf> {
        mounts_below(&self.directory)
    }

    /// The process that mounts and supervises.
    #[track_caller]
    pub fn supervisor(&self) -> Option<Pid> {
        let folder = self.scene.source.scratch().path().display().to_string();
        let found = processes().into_iter().filter(|(pid, process)| {
            let command = fs::read(process.join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            command.contains("serve-restore") && command.contains(&folder) && is_alive(*pid)
        });
        let found: Vec<Pid> = found.map(|(pid, _)| pid).collect();
        assert!(found.len() < 2, "several supervisors: {found:?}");
        found.first().copied()
    }

    /// The postmaster, by its own file.
    #[track_caller]
    pub fn postmaster(&self) -> Pid {
        let text = fs::read_to_string(self.directory.join("postmaster.pid")).unwrap();
        Pid::from_raw(text.lines().next().unwrap().trim().parse().unwrap())
    }

    /// Kills, and waits until the server has no process any more.
    #[track_caller]
    pub fn kill(&self, victim: Victim) {
        let (supervisor, postmaster) = (self.supervisor(), self.postmaster());
        let supervisor = supervisor.expect("an unfinished restore has a supervisor");
        let servers = processes_in(&self.directory);
        assert!(servers.contains(&postmaster), "{postmaster} is not among {servers:?}");
        let killed = match victim {
            Victim::Supervisor => vec![supervisor],
            Victim::Postmaster => vec![postmaster],
            Victim::Both => vec![supervisor, postmaster],
            Victim::Host => [&[supervisor][..], &servers].concat(),
        };
        for process in &killed {
            let _ = kill(*process, Signal::SIGKILL);
        }
        // Collected too: PostgreSQL takes the number of a dead process for a server.
        wait_for("those that were killed, and the server, to be gone", || {
            (!killed.iter().chain(&servers).any(|process| is_there(*process))).then_some(())
        });
        if victim == Victim::Host {
            self.detach();
        }
    }

    /// Takes the mounts away, as a reboot does.
    #[track_caller]
    pub fn detach(&self) {
        // A point may have several mounts, one over the other.
        wait_for("the mounts to be taken away", || {
            let mounts = mounts_below(self.scene.source.scratch().path());
            let own: Vec<_> = mounts.into_iter().filter(|point| !point.ends_with(BENEATH)).collect();
            own.iter().for_each(|point| unmount(point));
            own.is_empty().then_some(())
        });
    }

    /// Runs pg_ctl as the directory's owner does.
    #[track_caller]
    pub fn pg_ctl(&self, arguments: &[&str]) -> Run {
        let pg_ctl = self.scene.source.bin_directory().join("pg_ctl");
        let mut command = Account::of_postgresql().command(pg_ctl);
        Run::of(command.arg("-D").arg(&self.directory).args(arguments), "")
    }

    /// Stops the server as its owner does.
    #[track_caller]
    pub fn stop(&self) {
        self.pg_ctl(&["-w", "-t", "80", "-m", "fast", "stop"]).expect_success();
    }

    /// Starts the server as its owner does, without a word of the tests or of Walden.
    #[track_caller]
    pub fn start(&self) {
        let log = self.log();
        let start = self.pg_ctl(&["-w", "-t", "80", "-l", log.to_str().unwrap(), "start"]);
        assert!(start.success(), "{}\n{}", start.stderr, fs::read_to_string(&log).unwrap_or_default());
    }

    fn log(&self) -> PathBuf {
        PathBuf::from(format!("{}.log", self.directory.display()))
    }

    /// Checks that no server starts on the directory as it lies there.
    #[track_caller]
    pub fn assert_bare_refuses(&self) {
        assert_eq!(self.mounts(), [] as [PathBuf; 0], "it is not bare");
        let refused = self.pg_ctl(&["-w", "-l", self.log().to_str().unwrap(), "start"]);
        assert!(!refused.success(), "a server starts on an unfinished restore");
        assert!(refused.stderr.contains("is not a database cluster directory"), "{}", refused.stderr);
    }

    /// The same where somebody who knows better gives it the one file that pg_ctl asks for.
    #[track_caller]
    pub fn assert_bare_refuses_twice(&self) {
        self.assert_bare_refuses();
        let (log, version) = (self.log(), self.directory.join("PG_VERSION"));
        assert!(!self.directory.join("global/pg_control").exists());
        fs::write(&version, format!("{}\n", self.scene.source.major())).unwrap();
        Account::of_postgresql().own(&version);
        let refused = self.pg_ctl(&["-w", "-l", log.to_str().unwrap(), "start"]);
        assert!(!refused.success(), "a server starts on an unfinished restore");
        let told = fs::read_to_string(&log).unwrap();
        assert!(told.contains("could not find the database system"), "{told}");
        fs::remove_file(version).unwrap();
    }

    /// Waits until nothing of Walden is left, and checks that the directory is one like any other.
    #[track_caller]
    pub fn assert_plain(&self) {
        self.assert_plain_with(&[]);
    }

    /// The same with the directories of tablespaces.
    #[track_caller]
    pub fn assert_plain_with(&self, tablespaces: &[&Path]) {
        wait_for("the supervisor to end", || self.supervisor().is_none().then_some(()));
        for place in [&[&*self.directory][..], tablespaces].concat() {
            assert_eq!(mounts_below(place), [] as [PathBuf; 0], "{}", place.display());
            for name in AREA_NAMES {
                assert!(!place.join(name).exists(), "{} has {name}", place.display());
            }
            let marked = marked_below(place);
            assert!(marked.is_empty(), "these say where they came from: {marked:?}");
        }
        for file in ["PG_VERSION", "global/pg_control"] {
            assert!(self.directory.join(file).is_file(), "{file} is not in its place");
        }
        let wal = fs::symlink_metadata(self.directory.join("pg_wal")).unwrap();
        assert!(wal.is_dir(), "pg_wal is no directory: {wal:?}");
    }

    /// Has PostgreSQL look at every heap and index, stops it, and finds a plain directory whose pages are right.
    #[track_caller]
    pub fn assert_ends_sound(&self) {
        self.amcheck();
        self.stop();
        self.assert_plain();
        self.assert_checksums();
    }

    /// Has PostgreSQL's own programs read every page of a server that was stopped.
    #[track_caller]
    pub fn assert_checksums(&self) {
        let bin = bin_directory(15).expect("the test required it");
        let mut command = Account::of_postgresql().command(bin.join("pg_checksums"));
        Run::of(command.args(["--check", "-D"]).arg(&self.directory), "").expect_success();
    }

    /// Checks every heap and every index against its heap, by a program that knows 14 and later.
    #[track_caller]
    pub fn amcheck(&self) {
        let bin = bin_directory(15).expect("the test required it");
        let mut command = Account::of_postgresql().command(bin.join("pg_amcheck"));
        command.args(["--all", "--install-missing", "--heapallindexed", "-U", "postgres", "-h"]);
        Run::of(command.arg(&self.host).args(["-p", &self.port.to_string()]), "").expect_success();
    }

    /// Starts the plain directory, checks that it takes writes, and that PostgreSQL finds nothing wrong with it.
    #[track_caller]
    pub fn assert_starts_natively(&self) {
        self.start();
        wait_until_writable(&self.sql);
        self.sql("create table native as select n from generate_series(1, 100) n; checkpoint");
        self.sql("drop table native");
        if self.scene.source.major() >= 14 {
            self.amcheck();
        }
    }
}

/// A command of somebody else's foreground; it is killed when dropped.
pub struct Beside {
    process: Child,
    output: PathBuf,
}

impl Beside {
    #[track_caller]
    pub fn start(walden: &Walden, words: &[&str]) -> Self {
        // Files, because a pipe that nobody reads would hold it up.
        let output = tempfile::Builder::new().prefix("walden-beside-").tempdir().unwrap().keep();
        let file = |name: &str| fs::File::create(output.join(name)).unwrap();
        let mut command = walden.command();
        command.args(["--output", "json"]).args(words).stdin(Stdio::null());
        command.stdout(file("out")).stderr(file("err"));
        Self { process: command.spawn().unwrap(), output }
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.output.join(name)).unwrap()
    }

    /// What it has said on standard error.
    pub fn told(&self) -> String {
        self.read("err")
    }

    /// Whether it has said a word, on either output.
    pub fn has_told(&self, word: &str) -> bool {
        self.told().contains(word) || self.read("out").contains(word)
    }

    pub fn has_ended(&mut self) -> bool {
        self.process.try_wait().unwrap().is_some()
    }

    #[track_caller]
    pub fn assert_no_failure(&mut self) {
        let ended = self.process.try_wait().unwrap();
        assert!(ended.is_none_or(|status| status.success()), "{ended:?}: {}", self.told());
    }

    /// Waits until it ends well, and returns its report.
    #[track_caller]
    pub fn report(&mut self) -> Value {
        let status = self.wait();
        assert!(status.success(), "{status}: {}", self.told());
        serde_json::from_str(&self.read("out")).unwrap()
    }

    /// Waits until it ends, whatever comes of it.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the command to end", || self.process.try_wait().unwrap())
    }

    /// Sends it a signal and returns how it ended.
    #[track_caller]
    pub fn signal(&mut self, signal: Signal) -> ExitStatus {
        assert!(!self.has_ended(), "it had ended: {}", self.told());
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
        self.wait()
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.output);
    }
}

/// Whether a process has its number still.
pub fn is_there(process: Pid) -> bool {
    Path::new(&format!("/proc/{process}")).exists()
}

/// Whether a process runs; one that only waits to be collected does not.
pub fn is_alive(process: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

fn processes() -> Vec<(Pid, PathBuf)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let numbered = entries.filter_map(|it| Some((it.file_name().to_str()?.parse().ok()?, it.path())));
    numbered.map(|(pid, path)| (Pid::from_raw(pid), path)).collect()
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { found.extend(files_below(&path)) } else { found.push(path) }
    }
    found
}

/// Everything below a directory that has an attribute of Walden's.
fn marked_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if attributes(&path).contains("walden") {
            found.push(path.clone());
        }
        if entry.file_type().unwrap().is_dir() {
            found.extend(marked_below(&path));
        }
    }
    found
}

/// The names of a file's extended attributes.
#[expect(unsafe_code, reason = "no wrapper for extended attributes")]
fn attributes(path: &Path) -> String {
    let name = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut buffer = [0_u8; 1024];
    // SAFETY: the name ends in NUL, the buffer is as long as is said, and both outlive the call.
    let length = unsafe { libc::llistxattr(name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    String::from_utf8_lossy(&buffer[..usize::try_from(length).unwrap_or(0)]).into_owned()
}

/// What `report` has under a name.
#[track_caller]
pub fn word<'a>(report: &'a Value, name: &str) -> &'a str {
    report[name].as_str().unwrap_or_else(|| panic!("no {name} in {report}"))
}
