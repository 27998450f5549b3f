//! A PostgreSQL server on a data directory that exists: a source, a copy, a mount, a restored cluster.
//!
//! The postmaster is a child in the test's own process group, so that a test the runner ends takes its servers with it.
//! Socket, port and settings come on the command line: the data directory is not touched to start it.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::net::TcpListener;
use std::ops::Deref;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::needs::bin_directory;
use super::scratch::{Account, processes_in};
use super::{Sql, wait_for};

/// How to stop a server, in PostgreSQL's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Rolls back, writes a shutdown checkpoint, archives what is complete.
    Fast,
    /// Ends all processes without a checkpoint: the next start recovers.
    Immediate,
    /// `kill -9` of the postmaster and every process it had.
    Kill,
}

/// A server that runs, or ran, on a data directory.
#[derive(Debug)]
pub struct Server {
    major: u32,
    data_directory: PathBuf,
    log: PathBuf,
    settings: Vec<(String, String)>,
    account: Account,
    sql: Sql,
    postmaster: Option<Child>,
}

impl Deref for Server {
    type Target = Sql;

    fn deref(&self) -> &Sql {
        &self.sql
    }
}

impl Server {
    /// Names a server without starting it: its socket and log are in `run_directory`, its port is free on loopback,
    /// where it listens only if a setting says so.
    pub fn new(major: u32, data_directory: &Path, run_directory: &Path) -> Self {
        let (port, log) = free_port(run_directory);
        Self {
            major,
            data_directory: data_directory.to_owned(),
            log,
            settings: Vec::new(),
            account: Account::of_postgresql(),
            sql: Sql::at(run_directory, port),
            postmaster: None,
        }
    }

    /// Adds a setting to the command line of later starts.
    pub fn set(&mut self, name: &str, value: &str) -> &mut Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts the server and waits until it accepts connections, as a primary or a hot standby.
    #[track_caller]
    pub fn start(&mut self) {
        if let Err(log) = self.try_start() {
            panic!("PostgreSQL {} on {} ended:\n{log}", self.major, self.data_directory.display());
        }
    }

    /// Starts the server and waits until it accepts connections; returns its log if it ended instead.
    #[track_caller]
    pub fn try_start(&mut self) -> Result<(), String> {
        self.spawn();
        let ended = wait_for("PostgreSQL to accept connections or to end", || {
            if !self.is_running() { Some(true) } else { self.is_ready().then_some(false) }
        });
        if ended { Err(self.log()) } else { Ok(()) }
    }

    /// Starts the server without waiting for anything.
    #[track_caller]
    pub fn spawn(&mut self) {
        assert!(self.postmaster.is_none(), "the server on {} runs already", self.data_directory.display());
        let log = OpenOptions::new().create(true).append(true).open(&self.log).unwrap();
        let bin =
            bin_directory(self.major).unwrap_or_else(|| panic!("there is no PostgreSQL {}", self.major));
        let mut command = self.account.command(bin.join("postgres"));
        command.arg("-D").arg(&self.data_directory);
        let (sockets, port) = (self.sql.host.display().to_string(), self.sql.port.to_string());
        let own = [("listen_addresses", ""), ("unix_socket_directories", &*sockets), ("port", &*port)];
        let given = self.settings.iter().map(|(name, value)| (&**name, &**value));
        for (name, value) in own.into_iter().chain(given) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.postmaster = Some(command.spawn().unwrap());
    }

    /// Stops the server and waits until all its processes are gone.
    #[track_caller]
    pub fn stop(&mut self, how: Stop) {
        let Some(mut postmaster) = self.postmaster.take() else { return };
        let processes = if how == Stop::Kill { processes_in(&self.data_directory) } else { Vec::new() };
        let signal = match how {
            Stop::Fast => Signal::SIGINT,
            Stop::Immediate => Signal::SIGQUIT,
            Stop::Kill => Signal::SIGKILL,
        };
        // It may have ended by itself: then there is nothing to signal and its status tells.
        let _ = kill(Pid::from_raw(postmaster.id() as i32), signal);
        for process in processes {
            let _ = kill(process, Signal::SIGKILL);
        }
        let status = wait_for("the postmaster to end", || postmaster.try_wait().unwrap());
        wait_for("the server's processes to end", || {
            processes_in(&self.data_directory).is_empty().then_some(())
        });
        let expected = status.success() || (how == Stop::Kill && status.signal() == Some(9));
        assert!(expected, "PostgreSQL ended with {status}:\n{}", self.log());
    }

    /// Waits until the server ends by itself, and returns its exit status and log.
    #[track_caller]
    pub fn wait(&mut self) -> (Option<i32>, String) {
        let mut postmaster = self.postmaster.take().expect("a server to wait for was started");
        let status = wait_for("PostgreSQL to end by itself", || postmaster.try_wait().unwrap());
        (status.code(), self.log())
    }

    /// Stops and starts the server.
    #[track_caller]
    pub fn restart(&mut self) {
        self.stop(Stop::Fast);
        self.start();
    }

    /// Says whether the postmaster is there.
    pub fn is_running(&mut self) -> bool {
        self.postmaster.as_mut().is_some_and(|postmaster| postmaster.try_wait().unwrap().is_none())
    }

    /// Reads from `postmaster.pid`, as pg_ctl does, whether connections are accepted; asks where it cannot be read.
    fn is_ready(&self) -> bool {
        let Ok(file) = fs::read_to_string(self.data_directory.join("postmaster.pid")) else {
            return self.answers();
        };
        let lines: Vec<&str> = file.lines().map(str::trim).collect();
        let own = self.postmaster.as_ref().map(|postmaster| postmaster.id().to_string());
        let ours = lines.first().map(|pid| (*pid).to_owned()) == own;
        ours && lines.get(7).is_some_and(|status| ["ready", "standby"].contains(status))
    }

    /// Returns all it logged so far, over all its starts.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Returns the major version.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// Returns the data directory.
    pub fn data_directory(&self) -> &Path {
        &self.data_directory
    }

    /// Returns where this version's programs are.
    pub fn bin_directory(&self) -> PathBuf {
        bin_directory(self.major).expect("the server was started from there")
    }

    /// Sets `archive_command` for good and reloads; `archive_mode` must be on.
    pub fn set_archive_command(&self, command: &str) {
        let quoted = command.replace('\'', "''");
        self.sql(&format!("alter system set archive_command = '{quoted}'"));
        self.sql("select pg_reload_conf()");
    }

    /// Ends the current WAL segment and waits until it is archived; returns its name.
    #[track_caller]
    pub fn archive_wal(&self) -> String {
        // A segment without a record is not switched: the transaction writes one.
        self.sql("select pg_logical_emit_message(false, 'test', 'a record')");
        let segment = self.sql("select pg_walfile_name(pg_switch_wal())");
        self.wait_until_archived(&segment);
        segment
    }

    /// Waits until the archiver is done with a segment.
    #[track_caller]
    pub fn wait_until_archived(&self, segment: &str) {
        let wal = self.data_directory.join("pg_wal");
        let done = wal.join("archive_status").join(format!("{segment}.done"));
        wait_for(&format!("{segment} to be archived"), || {
            (done.exists() || !wal.join(segment).exists()).then_some(())
        });
    }
}

/// Returns a port and the log of the server on it, which exists from now on.
///
/// The kernel gives a port again once it is closed. A server that cannot start because another one in its run
/// directory has its port would seem to run, with the other's answers.
fn free_port(run_directory: &Path) -> (u16, PathBuf) {
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let log = run_directory.join(format!("postgresql-{port}.log"));
        match OpenOptions::new().write(true).create_new(true).open(&log) {
            Ok(_) => return (port, log),
            Err(error) => assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{}: {error}", log.display()),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut postmaster) = self.postmaster.take() {
            for process in processes_in(&self.data_directory) {
                let _ = kill(process, Signal::SIGKILL);
            }
            let _ = postmaster.kill();
            let _ = postmaster.wait();
        }
        remove_shared_memory(&self.data_directory);
    }
}

/// Removes what a server that was killed leaves behind: a System V segment, of which a machine has 4096. After some runs of
/// all tests no server would start any more.
fn remove_shared_memory(data_directory: &Path) {
    let pid_file = fs::read_to_string(data_directory.join("postmaster.pid")).unwrap_or_default();
    let Some(id) = pid_file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)) else { return };
    let segments = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let is_left = segments.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // In a copy of a data directory stands the segment of its source, which may still use it.
        fields.get(1) == Some(&id) && fields.get(6) == Some(&"0")
    });
    if is_left {
        let _ = Command::new("ipcrm").args(["-m", id]).status();
    }
}
