//! pgbench: its tables, and its load in the background until it is told to stop.

use std::process::{Child, Command, Stdio};

use super::needs::program;
use super::{Run, Sql};

/// A load that runs.
#[derive(Debug)]
pub struct Pgbench {
    process: Child,
}

impl Pgbench {
    /// Creates pgbench's tables: a scale is 100 000 accounts, about 16 MB.
    #[track_caller]
    pub fn initialize(sql: &Sql, scale: u32) {
        Self::run(sql, &["--initialize", "--quiet", "--scale", &scale.to_string()]);
    }

    /// Runs pgbench to its end and returns what it printed.
    #[track_caller]
    pub fn run(sql: &Sql, options: &[&str]) -> String {
        Run::of(command(sql).args(options), "").expect_success().stdout
    }

    /// Starts the TPC-B-like load with some clients; it runs until stopped or dropped.
    pub fn start(sql: &Sql, clients: u32) -> Self {
        Self::start_with(sql, clients, &[])
    }

    /// Starts the load with a limit to its transactions a second.
    pub fn start_at_rate(sql: &Sql, clients: u32, rate: u32) -> Self {
        Self::start_with(sql, clients, &["--rate", &rate.to_string()])
    }

    fn start_with(sql: &Sql, clients: u32, options: &[&str]) -> Self {
        let mut command = command(sql);
        command.args(["--no-vacuum", "--time", "86400", "--client", &clients.to_string()]).args(options);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self { process: command.spawn().unwrap() }
    }

    /// Says whether it still runs: it gives up at the first error.
    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }
}

impl Drop for Pgbench {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn command(sql: &Sql) -> Command {
    let mut command = Command::new(program("pgbench").expect("the test required PostgreSQL"));
    command.env("PGHOST", &sql.host).env("PGPORT", sql.port.to_string());
    command.env("PGUSER", &sql.user).env("PGDATABASE", &sql.database).current_dir("/");
    command
}
