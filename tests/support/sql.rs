//! SQL for tests, through psql: one statement or script in, text out.
//!
//! A process for each call is slow enough to be noticed and simple enough to be trusted; it works the same against a
//! source, a clone and a restored cluster of any version. Load comes from `pgbench` and `chaos` instead.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Run;
use super::needs::program;

const COLUMN: char = '\u{1f}';
const ROW: char = '\u{1e}';

/// Where to connect.
#[derive(Debug, Clone)]
pub struct Sql {
    pub host: PathBuf,
    pub port: u16,
    pub user: String,
    pub database: String,
}

impl Sql {
    /// Names a server by its socket directory and port, and in it superuser and database postgres.
    pub fn at(host: &Path, port: u16) -> Self {
        Self { host: host.to_owned(), port, user: "postgres".into(), database: "postgres".into() }
    }

    /// Names another database of the same server.
    pub fn in_database(&self, database: &str) -> Self {
        Self { database: database.to_owned(), ..self.clone() }
    }

    /// Returns the connection in libpq's syntax.
    pub fn connection(&self) -> String {
        let Self { host, port, user, database } = self;
        format!("host={} port={port} user={user} dbname={database}", host.display())
    }

    /// Runs a script and returns what it printed: values alone, `|` between columns, a line each row.
    #[track_caller]
    pub fn sql(&self, script: &str) -> String {
        self.try_sql(script).unwrap_or_else(|error| panic!("{script}\n{error}"))
    }

    /// Runs a script; on failure returns the messages.
    pub fn try_sql(&self, script: &str) -> Result<String, String> {
        let text = self.psql(script, &[])?;
        Ok(text.trim_end_matches('\n').to_owned())
    }

    /// Runs a query and returns its rows.
    #[track_caller]
    pub fn rows(&self, query: &str) -> Vec<Vec<String>> {
        let separators = [format!("--field-separator={COLUMN}"), format!("--record-separator={ROW}")];
        let text = self.psql(query, &separators).unwrap_or_else(|error| panic!("{query}\n{error}"));
        let text = text.trim_end_matches(['\n', ROW]);
        let rows = text.split(ROW).filter(|_| !text.is_empty());
        rows.map(|row| row.split(COLUMN).map(str::to_owned).collect()).collect()
    }

    /// Says whether the server accepts connections.
    pub fn answers(&self) -> bool {
        self.try_sql("select 1").is_ok()
    }

    /// Lists the databases one can connect to, template0 aside.
    pub fn databases(&self) -> Vec<String> {
        let query =
            "select datname from pg_database where datallowconn and datname <> 'template0' order by 1";
        self.rows(query).concat()
    }

    /// Feeds the script on standard input, because there psql's own commands work as well.
    fn psql(&self, script: &str, options: &[String]) -> Result<String, String> {
        let mut command = Command::new(program("psql").expect("the test required PostgreSQL"));
        command.args(["--no-psqlrc", "--no-align", "--tuples-only", "--quiet", "--no-password"]);
        command.args(["--set=ON_ERROR_STOP=1", "--file=-"]).args(options).arg(self.connection());
        command.env("PGOPTIONS", "-c client_min_messages=warning").current_dir("/");
        let output = Run::of(&mut command, script);
        if output.success() { Ok(output.stdout) } else { Err(output.stderr) }
    }
}
