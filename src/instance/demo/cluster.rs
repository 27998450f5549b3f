//! The scratch cluster: initialized, filled, put under load, and stopped.
//!
//! The postmaster and pgbench are children of the demonstration and die with it at the latest. `fsync` is off,
//! because nothing of this cluster outlives the demonstration; what Walden promises does not depend on it.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use crate::clock::Clock;
use crate::instance::demo::commands::{program, run};
use crate::instance::demo::error::DemoError;
use crate::instance::demo::scratch::{Account, Scratch};
use crate::replication::{ConnectOptions, Session};

/// The database that is loaded.
pub(super) const DATABASE: &str = "demo";
/// The port is part of the socket's name and of nothing else.
const PORT: u16 = 5432;
/// How often a server is asked whether it is ready, or how far it is.
const POLL: Duration = Duration::from_millis(50);
/// A server without data starts within a second; ten times over for a machine that does something else.
const START_MAX: Duration = Duration::from_secs(60);
/// How long the archiver may stand still, or a server take to stop.
const STILL_MAX: Duration = Duration::from_secs(60);
/// Rows of text for each pgbench scale: as long as a line of a log.
const NOTES_PER_SCALE: u32 = 5_000;

/// What pgbench's own transactions leave out: rows that are wide, new, and gone again.
const NOTES_LOAD: &str = "\
\\set n random(1, 1000000000)
insert into public.notes (body) select 'event ' || :n || ': ' || repeat(md5(:n::text), 5);
update public.notes set body = body || ' seen' where id = 1 + :n % 1000;
delete from public.notes where id = 1001 + :n % 5000;
";

/// A cluster and its server.
#[derive(Debug)]
pub(super) struct Cluster {
    bin_directory: PathBuf,
    data_directory: PathBuf,
    socket_directory: PathBuf,
    log_file: PathBuf,
    load_file: PathBuf,
    home: PathBuf,
    account: Account,
    clock: Arc<dyn Clock>,
    postmaster: Option<Child>,
    load: Option<Child>,
}

impl Cluster {
    /// Names a cluster in the folder; nothing of it is there yet.
    pub(super) fn prepare(
        scratch: &Scratch,
        bin_directory: PathBuf,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, DemoError> {
        Ok(Self {
            bin_directory,
            data_directory: scratch.join("data"),
            socket_directory: scratch.join("run"),
            log_file: scratch.write("server.log", "")?,
            load_file: scratch.write("load.sql", NOTES_LOAD)?,
            home: scratch.path().to_owned(),
            account: scratch.account().clone(),
            clock,
            postmaster: None,
            load: None,
        })
    }

    /// Initializes the cluster, to archive by `archive_command`.
    pub(super) async fn initdb(&self, archive_command: &str) -> Result<(), DemoError> {
        let mut initdb = self.program("initdb");
        initdb.arg("-D").arg(&self.data_directory).args(["--data-checksums", "--no-sync", "--auth=trust"]);
        initdb.args(["--username=postgres", "--encoding=UTF8", "--locale=C"]);
        run(initdb, "initdb").await?;
        let file = self.data_directory.join("postgresql.conf");
        let sample = std::fs::read_to_string(&file).map_err(DemoError::at("read", &file))?;
        let sockets = self.socket_directory.display().to_string();
        let settings = settings(&sockets, archive_command);
        std::fs::write(&file, sample + &settings).map_err(DemoError::at("write", &file))
    }

    /// Starts the server and waits until it answers.
    pub(super) async fn start(&mut self) -> Result<(), DemoError> {
        let log = std::fs::OpenOptions::new().append(true).open(&self.log_file);
        let log = log.map_err(DemoError::at("open", &self.log_file))?;
        let mut postgres = self.program("postgres");
        postgres.arg("-D").arg(&self.data_directory).stdout(Stdio::null()).stderr(log);
        let spawned = postgres.spawn();
        self.postmaster =
            Some(spawned.map_err(|source| DemoError::Spawn { command: "postgres".to_owned(), source })?);
        let deadline = self.clock.monotonic() + START_MAX;
        while self.session_in("postgres").await.is_err() {
            if self.has_ended() {
                return Err(self.server_error("ended while it was starting"));
            }
            if self.clock.monotonic() > deadline {
                return Err(self.server_error("did not start in time"));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Creates the database with pgbench's tables and a table of text with an index.
    pub(super) async fn fill(&self, scale: u32) -> Result<(), DemoError> {
        let postgres = self.session_in("postgres").await?;
        postgres.simple(&format!("create database {DATABASE}")).await?;
        let mut pgbench = self.pgbench();
        pgbench.args(["--initialize", "--quiet", "--scale", &scale.to_string()]);
        run(pgbench, "pgbench --initialize").await?;
        let notes = format!(
            "create table public.notes (id bigserial primary key, written timestamptz default now(), body text);
             insert into public.notes (body)
                 select 'event ' || n || ': ' || repeat(md5(n::text), 5) from generate_series(1, {}) n;
             create index notes_body on public.notes (body);
             vacuum analyze public.notes",
            u64::from(NOTES_PER_SCALE) * u64::from(scale)
        );
        let session = self.session().await?;
        for statement in notes.split(';') {
            session.simple(statement).await?;
        }
        session.simple("checkpoint").await?;
        Ok(())
    }

    /// Starts a load of short transactions that goes on until it is stopped.
    pub(super) fn start_load(&mut self) -> Result<(), DemoError> {
        let mut pgbench = self.pgbench();
        pgbench.args(["--no-vacuum", "--client=2", "--time=86400", "--builtin=tpcb-like@4", "--file"]);
        pgbench.arg(format!("{}@1", self.load_file.display())).stdout(Stdio::null());
        let said = self.home.join("pgbench.log");
        pgbench.stderr(std::fs::File::create(&said).map_err(DemoError::at("create", &said))?);
        let spawned = pgbench.spawn();
        self.load =
            Some(spawned.map_err(|source| DemoError::Spawn { command: "pgbench".to_owned(), source })?);
        Ok(())
    }

    /// Stops the load and waits until the server has ended its sessions.
    pub(super) async fn stop_load(&mut self) -> Result<(), DemoError> {
        let Some(mut load) = self.load.take() else { return Ok(()) };
        if load.try_wait().is_ok_and(|status| status.is_some()) {
            let said = std::fs::read_to_string(self.home.join("pgbench.log")).unwrap_or_default();
            return Err(DemoError::LoadEnded { said });
        }
        // Killed is killed: that it cannot be signalled means that it is gone.
        let _ = load.kill().await;
        let session = self.session().await?;
        let others = "select count(*) from pg_stat_activity where application_name = 'pgbench'";
        while session.query_one(others, &[]).await?.int("count")? > 0 {
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Returns how many transactions the load has committed.
    pub(super) async fn transactions(&self) -> Result<u64, DemoError> {
        let history = "select count(*) from public.pgbench_history";
        Ok(self.session().await?.query_one(history, &[]).await?.unsigned("count")?)
    }

    /// Returns the size of the databases.
    pub(super) async fn database_bytes(&self) -> Result<u64, DemoError> {
        let size = "select sum(pg_database_size(oid))::bigint as bytes from pg_database";
        Ok(self.session().await?.query_one(size, &[]).await?.unsigned("bytes")?)
    }

    /// Ends the current WAL segment and waits until everything up to it is archived.
    pub(super) async fn archive_to_the_end(&self) -> Result<(), DemoError> {
        let session = self.session().await?;
        // A segment without a record is not switched.
        session.simple("select pg_logical_emit_message(false, 'walden', 'the end')").await?;
        let switched = "select pg_walfile_name(pg_switch_wal()) as segment";
        let segment = session.query_one(switched, &[]).await?.text("segment")?;
        let wal = self.data_directory.join("pg_wal");
        let done = wal.join("archive_status").join(format!("{segment}.done"));
        let (mut archived, mut since) = (-1, self.clock.monotonic());
        while !done.exists() && wal.join(&segment).exists() {
            let progress = "select archived_count, failed_count from pg_stat_archiver";
            let archiver = session.query_one(progress, &[]).await?;
            if archiver.int("archived_count")? > archived {
                (archived, since) = (archiver.int("archived_count")?, self.clock.monotonic());
            }
            if self.clock.monotonic() > since + STILL_MAX {
                let failed_count = archiver.int("failed_count")?;
                return Err(DemoError::NotArchived { segment, failed_count, log: self.log() });
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Returns how to connect to the loaded database.
    pub(super) fn connect_options(&self) -> ConnectOptions {
        ConnectOptions::new(connection(&self.socket_directory.display().to_string()))
    }

    /// Opens a session in the loaded database.
    pub(super) async fn session(&self) -> Result<Session, DemoError> {
        self.session_in(DATABASE).await
    }

    /// Opens a session in a database.
    pub(super) async fn session_in(&self, database: &str) -> Result<Session, DemoError> {
        Ok(Session::connect(&self.connect_options().with("dbname", database)?).await?)
    }

    /// Stops load and server, whatever state they are in; says what did not end.
    pub(super) async fn stop(&mut self) -> Result<(), DemoError> {
        if let Some(mut load) = self.load.take() {
            let _ = load.kill().await;
        }
        let Some(mut postmaster) = self.postmaster.take() else { return Ok(()) };
        // Fast first; a server that is still there after that is told to end at once.
        for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGKILL] {
            let Some(pid) = postmaster.id().and_then(|pid| i32::try_from(pid).ok()) else { return Ok(()) };
            let _ = kill(Pid::from_raw(pid), signal);
            if tokio::time::timeout(STILL_MAX, postmaster.wait()).await.is_ok() {
                return Ok(());
            }
        }
        Err(self.server_error("did not stop"))
    }

    fn has_ended(&mut self) -> bool {
        self.postmaster.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
    }

    fn server_error(&self, what: &'static str) -> DemoError {
        DemoError::Server { what, log: self.log() }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log_file).unwrap_or_default()
    }

    fn program(&self, name: &str) -> Command {
        let mut command = program(self.bin_directory.join(name), Some(&self.account), &self.home);
        command.current_dir(&self.home);
        command
    }

    fn pgbench(&self) -> Command {
        let mut pgbench = self.program("pgbench");
        pgbench.env("PGHOST", &self.socket_directory).env("PGPORT", PORT.to_string());
        pgbench.env("PGUSER", "postgres").env("PGDATABASE", DATABASE);
        pgbench
    }
}

/// Returns the connection to the server whose socket is in that folder.
pub(super) fn connection(socket_directory: &str) -> String {
    let host = socket_directory.replace('\\', r"\\").replace('\'', r"\'");
    format!("host='{host}' port={PORT} user=postgres dbname={DATABASE}")
}

/// Returns the lines for postgresql.conf.
fn settings(socket_directory: &str, archive_command: &str) -> String {
    let quoted = |value: &str| format!("'{}'", value.replace('\\', r"\\").replace('\'', "''"));
    let port = PORT.to_string();
    let settings = [
        ("listen_addresses", ""),
        ("unix_socket_directories", socket_directory),
        ("unix_socket_permissions", "0700"),
        ("port", &port),
        ("archive_mode", "on"),
        ("archive_command", archive_command),
        ("fsync", "off"),
        ("shared_buffers", "128MB"),
        ("max_wal_size", "1GB"),
        ("log_checkpoints", "off"),
        ("log_line_prefix", "%m [%p] "),
    ];
    let lines = settings.map(|(name, value)| format!("{name} = {}\n", quoted(value)));
    format!("\n# walden demo\n{}", lines.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_quoted_as_the_server_reads_them() {
        let lines = settings("/tmp/x", r"'/a\b' --config '/c' wal push %p");
        assert!(lines.contains("archive_command = '''/a\\\\b'' --config ''/c'' wal push %p'\n"), "{lines}");
        assert!(lines.contains("listen_addresses = ''\n"), "{lines}");
    }

    #[test]
    fn the_connection_names_socket_and_database() {
        assert_eq!(connection("/tmp/it's"), r"host='/tmp/it\'s' port=5432 user=postgres dbname=demo");
    }
}
