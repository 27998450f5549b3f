//! The one SQL session: dedicated, without server-side timeouts, and honest about its end.
//!
//! A basebackup lives and dies with the session that started it, so this session never reconnects. It proves at its
//! start that it speaks to one server process and not to a pooler; it asks the server to notice when the client is
//! gone; and when the connection ends, every later call says so and why.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use tokio::sync::watch;
use tokio_postgres::error::DbError;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::connection::{self, Connected, Driver, MARKER, Statements};
use super::settings::SessionAttributes;
use crate::pg::MajorVersion;
use crate::replication::{ConnectOptions, Error, Param, Row};

/// The first statements of a session are answered from memory: a server that takes longer hangs, though it let us log in.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(30);

/// What a server is at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ServerRole {
    /// It accepts writes.
    Primary,
    /// It is in recovery.
    Standby,
}

/// A session of its own with one server.
pub struct Session {
    client: Client,
    address: String,
    user: String,
    version: MajorVersion,
    version_number: u32,
    backend_pid: i64,
    /// Why the connection ended, once it has.
    ended: watch::Receiver<Option<String>>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("address", &self.address)
            .field("user", &self.user)
            .field("version_number", &self.version_number)
            .field("backend_pid", &self.backend_pid)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Opens a session on the first server of `options` that answers and is of the kind asked for.
    pub async fn connect(options: &ConnectOptions) -> Result<Self, Error> {
        let target = connection::resolve(options)?;
        let passes: &[SessionAttributes] = match target.attributes {
            SessionAttributes::PreferStandby => &[SessionAttributes::Standby, SessionAttributes::Any],
            ref other => std::slice::from_ref(other),
        };
        let mut failure = None;
        for wanted in passes {
            let mut next = 0;
            while next < target.endpoints.len() {
                let marker = random_marker();
                let (connected, number) =
                    match connection::connect::<Statements>(&target, options, &marker, next).await {
                        Ok(connected) => connected,
                        Err(error) => {
                            failure.get_or_insert(error);
                            break;
                        }
                    };
                let address = connected.address.clone();
                let begun = tokio::time::timeout(BEGIN_TIMEOUT, async {
                    let session = Self::begin(connected, &marker).await?;
                    let fits = session.is(*wanted).await?;
                    Ok::<_, Error>((session, fits))
                });
                failure = Some(match begun.await {
                    Ok(begun) => match begun? {
                        (session, true) => return Ok(session),
                        (_, false) => Error::WrongServer { address, wanted: wanted.to_string() },
                    },
                    Err(_) => Error::Unreachable {
                        address,
                        detail: format!("no answer within {} s of the login", BEGIN_TIMEOUT.as_secs()),
                    },
                });
                next = number + 1;
            }
        }
        Err(failure.expect("a target has an endpoint, and each ended in an error"))
    }

    async fn begin(connected: Connected<(Client, Driver)>, marker: &str) -> Result<Self, Error> {
        let Connected { link: (client, driver), address, user } = connected;
        let (ending, ended) = watch::channel(None);
        tokio::spawn(async move {
            let why = match driver.run().await {
                Some(error) => describe(&error),
                None => "the connection was closed".to_owned(),
            };
            // Nobody listens any more when the session was dropped, which is the ordinary end.
            let _ = ending.send(Some(why));
        });
        let mut session = Self {
            client,
            address,
            user,
            version: MajorVersion::V13,
            version_number: 0,
            backend_pid: 0,
            ended,
        };
        session.read_version().await?;
        session.check_dedicated(marker).await?;
        Ok(session)
    }

    async fn read_version(&mut self) -> Result<(), Error> {
        let sql = "SELECT current_setting('server_version_num')::bigint AS number, \
                   current_setting('server_version') AS version";
        let row = self.query_one(sql, &[]).await?;
        let (number, version) = (row.unsigned("number")?, row.text("version")?);
        let address = self.address.clone();
        self.version = MajorVersion::from_server_version_num(number)
            .map_err(|_| Error::WrongVersion { address, version })?;
        self.version_number = number;
        Ok(())
    }

    /// Sets the session up, and checks that both before and after it is the same session of the same process.
    async fn check_dedicated(&mut self, marker: &str) -> Result<(), Error> {
        let sql = format!(
            "SELECT pg_catalog.pg_backend_pid()::bigint AS pid, \
             pg_catalog.current_setting('{MARKER}', true) AS marker"
        );
        let before = self.query_one(&sql, &[]).await?;
        self.simple(&self.setup()).await?;
        let after = self.query_one(&sql, &[]).await?;
        let same = before.int("pid")? == after.int("pid")?;
        let marked = |row: &Row| Ok::<_, Error>(row.text_opt("marker")?.as_deref() == Some(marker));
        if !same || !marked(&before)? || !marked(&after)? {
            return Err(Error::Pooled { address: self.address.clone() });
        }
        self.backend_pid = after.int("pid")?;
        Ok(())
    }

    /// Returns the settings every session starts with.
    ///
    /// The last ones make the server notice within a minute that we are gone, even in the middle of a statement, so
    /// that a basebackup whose client died does not stay open on it.
    fn setup(&self) -> String {
        let major = self.version.number();
        let settings = [
            (13, "search_path = pg_catalog"),
            (13, "statement_timeout = 0"),
            (13, "lock_timeout = 0"),
            (13, "idle_in_transaction_session_timeout = 0"),
            (14, "idle_session_timeout = 0"),
            (17, "transaction_timeout = 0"),
            (14, "client_connection_check_interval = '10s'"),
            (13, "tcp_keepalives_idle = 30"),
            (13, "tcp_keepalives_interval = 10"),
            (13, "tcp_keepalives_count = 3"),
        ];
        let known = settings.iter().filter(|(since, _)| major >= *since);
        known.map(|(_, setting)| format!("SET {setting};")).collect()
    }

    async fn is(&self, wanted: SessionAttributes) -> Result<bool, Error> {
        if matches!(wanted, SessionAttributes::Any | SessionAttributes::PreferStandby) {
            return Ok(true);
        }
        let sql = "SELECT pg_is_in_recovery() AS standby, \
                   current_setting('default_transaction_read_only') = 'on' OR pg_is_in_recovery() AS read_only";
        let row = self.query_one(sql, &[]).await?;
        let (standby, read_only) = (row.bool("standby")?, row.bool("read_only")?);
        Ok(match wanted {
            SessionAttributes::Any | SessionAttributes::PreferStandby => true,
            SessionAttributes::ReadWrite => !read_only,
            SessionAttributes::ReadOnly => read_only,
            SessionAttributes::Primary => !standby,
            SessionAttributes::Standby => standby,
        })
    }

    /// Runs one statement with parameters and returns its rows.
    pub async fn query(&self, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>, Error> {
        let typed: Vec<_> = params
            .iter()
            .map(|param| (param as &(dyn tokio_postgres::types::ToSql + Sync), param.sql_type()))
            .collect();
        let rows = self.client.query_typed(sql, &typed).await;
        Ok(self.answered(rows).await?.into_iter().map(Row).collect())
    }

    /// Runs one statement that must answer with exactly one row.
    pub async fn query_one(&self, sql: &str, params: &[Param<'_>]) -> Result<Row, Error> {
        let mut rows = self.query(sql, params).await?;
        match (rows.pop(), rows.len()) {
            (Some(row), 0) => Ok(row),
            (last, others) => {
                let count = others + usize::from(last.is_some());
                Err(Error::Unexpected { detail: format!("{count} rows where one was expected") })
            }
        }
    }

    /// Runs any text of statements and returns the values of all their rows as text.
    pub async fn simple(&self, sql: &str) -> Result<Vec<Vec<Option<String>>>, Error> {
        let messages = self.answered(self.client.simple_query(sql).await).await?;
        let values = |row: &tokio_postgres::SimpleQueryRow| {
            (0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect()
        };
        let rows = messages.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(values(row)),
            _ => None,
        });
        Ok(rows.collect())
    }

    /// Waits until the session is lost, and says why; for watching it while other work relies on it.
    pub async fn lost(&self) -> Error {
        let mut ended = self.ended.clone();
        let detail = match ended.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => "the connection's task is gone".to_owned(),
        };
        Error::Lost { detail }
    }

    /// Returns the server's version as `server_version_num` has it, such as 150020.
    pub fn version_number(&self) -> u32 {
        self.version_number
    }

    /// Returns the server's major version.
    pub fn version(&self) -> MajorVersion {
        self.version
    }

    /// Returns where the server was reached, for messages.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns the role of the session.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Returns the process that serves this session.
    pub fn backend_pid(&self) -> i64 {
        self.backend_pid
    }

    /// Tells a refused statement from a lost session.
    async fn answered<T>(&self, result: Result<T, tokio_postgres::Error>) -> Result<T, Error> {
        let error = match result {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        match error.as_db_error() {
            Some(answer) if !ends_session(answer) => Err(sql_error(answer)),
            Some(answer) => Err(Error::Lost { detail: answer.message().to_owned() }),
            None if error.is_closed() || self.client.is_closed() => Err(self.lost().await),
            None => Err(Error::Unexpected { detail: describe(&error) }),
        }
    }
}

/// Turns the server's refusal of a statement into ours.
pub(super) fn sql_error(answer: &DbError) -> Error {
    Error::Sql {
        sqlstate: answer.code().code().to_owned(),
        message: answer.message().to_owned(),
        detail: answer.detail().map(str::to_owned),
        hint: answer.hint().map(str::to_owned),
    }
}

fn ends_session(answer: &DbError) -> bool {
    ["FATAL", "PANIC"].contains(&answer.severity()) || ["57P01", "57P02"].contains(&answer.code().code())
}

/// Says what the server said, or else what happened together with why.
pub(super) fn describe(error: &tokio_postgres::Error) -> String {
    match (error.as_db_error(), std::error::Error::source(error)) {
        (Some(answer), _) => answer.message().to_owned(),
        (None, Some(source)) => format!("{error}: {source}"),
        (None, None) => error.to_string(),
    }
}

/// Not a secret, only different from every other session's: the standard library's hasher keys are random.
fn random_marker() -> String {
    format!("{:016x}", RandomState::new().build_hasher().finish())
}
