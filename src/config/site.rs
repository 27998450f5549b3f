//! `[sites.NAME]`: a cluster, its servers, and where its backups lie.
//!
//! A site is complete after reading: what it leaves out is filled in from the top level. Deliberately absent:
//! asking the server for its data directory; whoever takes a backup does that.

use std::path::PathBuf;
use std::time::Duration;

use crate::backup::BackupSource;
use crate::replication::{ConnectOptions, ServerRole};
use crate::storage::{ObjectKey, Secret};
use crate::wal::receive::Acknowledge;

use super::environment::Environment;
use super::error::Result;
use super::storage::StorageConfig;
use super::table::{Entry, Table};

/// One site, with everything that was left out filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteConfig {
    /// The name, as `--site` takes it.
    pub name: String,
    /// The folder of the site in the repository.
    pub prefix: ObjectKey,
    /// The store.
    pub storage: StorageConfig,
    /// The server's data directory; `None`: ask the server.
    pub data_directory: Option<PathBuf>,
    /// The programs of PostgreSQL; `None`: look for them by version.
    pub bin_directory: Option<PathBuf>,
    /// The servers, in the order of the file; none where this host does not connect.
    pub nodes: Vec<Node>,
    /// How long `wal fetch` asks again for a segment that should be there.
    pub fetch_wait: Duration,
    /// How much WAL may wait before some is left out of the archive; `None`: any amount.
    pub queue_max_bytes: Option<u64>,
    /// Where the files of a basebackup come from.
    pub backup_source: BackupSource,
    /// How WAL comes into the archive.
    pub wal: WalSource,
    /// When a server that is received from is told that WAL is durable.
    pub acknowledge: Acknowledge,
    /// The replication slot for receiving.
    pub slot: String,
}

/// How WAL comes into the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WalSource {
    /// The server's archive_command brings it.
    #[default]
    Push,
    /// It is received by streaming.
    Receive,
}

/// A server of a site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The connection, in libpq's syntax or as a URL; there may be a password in it.
    pub connection: Secret,
    /// The role in which the server is preferred.
    pub prefer: ServerRole,
}

const SITE_NAME_LEN_MAX: usize = 64;
/// NAMEDATALEN - 1.
const SLOT_NAME_LEN_MAX: usize = 63;
/// Leaves room for the longest object key of a site.
const PREFIX_LEN_MAX: usize = 200;
const FETCH_WAIT_DEFAULT: Duration = Duration::from_secs(60);

impl SiteConfig {
    pub(super) fn read(name: &Entry<'_, String>, table: &Table<'_>, storage: &Table<'_>) -> Result<Self> {
        check_name(name)?;
        let own_storage = table.table("storage");
        let storage = if own_storage.is_present() { &own_storage } else { storage };
        let archive = table.table("archive");
        Ok(Self {
            name: name.value.clone(),
            prefix: prefix(name, table)?,
            storage: StorageConfig::read(storage)?,
            data_directory: table.path("data_directory")?,
            bin_directory: table.path("bin_directory")?,
            nodes: nodes(table)?,
            fetch_wait: archive.duration("fetch_wait")?.map_or(FETCH_WAIT_DEFAULT, |entry| entry.value),
            queue_max_bytes: archive.size("queue_max")?.map(|entry| entry.value),
            backup_source: match table.text("backup_source").as_ref().map(|entry| entry.value.as_str()) {
                Some("replication") => BackupSource::Replication,
                _ => BackupSource::DataDirectory,
            },
            wal: match table.text("wal").as_ref().map(|entry| entry.value.as_str()) {
                Some("receive") => WalSource::Receive,
                _ => WalSource::Push,
            },
            acknowledge: match archive.text("ack").as_ref().map(|entry| entry.value.as_str()) {
                Some("store") => Acknowledge::Store,
                _ => Acknowledge::Spool,
            },
            slot: slot(name, &archive)?,
        })
    }

    /// Returns whether the configuration file itself holds a secret of this site.
    pub(super) fn holds_secret(&self) -> bool {
        self.storage.holds_secret() || self.nodes.iter().any(Node::holds_password)
    }

    /// Returns whether both sites would write into one folder of one store.
    pub(super) fn collides_with(&self, other: &Self) -> bool {
        let (own, others) = (format!("{}/", self.prefix), format!("{}/", other.prefix));
        self.storage.location == other.storage.location
            && (own.starts_with(&others) || others.starts_with(&own))
    }
}

fn check_name(name: &Entry<'_, String>) -> Result<()> {
    if is_plain_name(&name.value) && name.value.len() <= SITE_NAME_LEN_MAX {
        return Ok(());
    }
    let hint =
        format!("Take letters, digits, _, - and . (not at the beginning), at most {SITE_NAME_LEN_MAX}.");
    Err(name.bad("not a name for a site", hint))
}

fn prefix(name: &Entry<'_, String>, table: &Table<'_>) -> Result<ObjectKey> {
    let entry = table.text("prefix").unwrap_or_else(|| name.clone());
    match ObjectKey::parse(&entry.value) {
        Ok(prefix) if entry.value.len() <= PREFIX_LEN_MAX => Ok(prefix),
        Ok(_) => Err(entry.bad(format!("longer than {PREFIX_LEN_MAX} bytes"), None)),
        Err(error) => Err(entry.bad(format!("not a folder for a site: {error}"), None)),
    }
}

fn slot(site: &Entry<'_, String>, archive: &Table<'_>) -> Result<String> {
    let Some(entry) = archive.text("slot") else { return Ok(default_slot(&site.value)) };
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if (1..=SLOT_NAME_LEN_MAX).contains(&entry.value.len()) && entry.value.chars().all(plain) {
        return Ok(entry.value);
    }
    let hint = format!("Take lower-case letters, digits and _, at most {SLOT_NAME_LEN_MAX}.");
    Err(entry.bad("not a name for a replication slot", hint))
}

/// Makes a slot's name of a site's: what a slot's may not hold becomes `_`.
fn default_slot(site: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    let name: String = format!("walden_{site}").chars().map(plain).collect();
    name[..name.len().min(SLOT_NAME_LEN_MAX)].to_owned()
}

fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    !name.is_empty() && !name.starts_with('.') && name.chars().all(plain)
}

fn nodes(table: &Table<'_>) -> Result<Vec<Node>> {
    let tables = table.tables("nodes");
    if let Some(connection) = table.text("connection") {
        if !tables.is_empty() {
            let hint = "Write it as another [[…nodes]].".to_owned();
            return Err(connection.bad("there are nodes as well", hint));
        }
        return Ok(vec![Node { connection: check_connection(connection)?, prefer: ServerRole::Primary }]);
    }
    tables.iter().map(node).collect()
}

fn node(table: &Table<'_>) -> Result<Node> {
    let Some(connection) = table.text("connection") else { return Err(table.missing("connection", None)) };
    let prefer = match table.text("prefer").as_ref().map(|entry| entry.value.as_str()) {
        Some("standby") => ServerRole::Standby,
        _ => ServerRole::Primary,
    };
    Ok(Node { connection: check_connection(connection)?, prefer })
}

/// Refuses what libpq would refuse, while the line is known.
fn check_connection(entry: Entry<'_, String>) -> Result<Secret> {
    match ConnectOptions::new(&entry.value).with("application_name", "walden") {
        Ok(_) => Ok(Secret::from(entry.value)),
        Err(error) => Err(entry.bad(error.to_string(), error.hint())),
    }
}

impl Node {
    /// Returns what a session takes: the connection, and the PG* variables for what it leaves open.
    pub fn connect_options(&self, environment: &Environment) -> Result<ConnectOptions> {
        Ok(ConnectOptions { env: environment.postgresql()?, ..ConnectOptions::new(self.connection.expose()) })
    }

    /// Returns whether the connection itself holds a password.
    fn holds_password(&self) -> bool {
        let text = self.connection.expose();
        let login = text.split_once("://").and_then(|(_, rest)| rest.rsplit_once('@'));
        text.contains("password") || login.is_some_and(|(login, _)| login.contains(':'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_noticed_in_both_forms() {
        for (connection, holds) in [
            ("host=a user=b", false),
            ("host=a password=b", true),
            ("postgres://user@host:5432/db", false),
            ("postgres://user:secret@host/db", true),
            ("postgres://host/db?password=secret", true),
            ("host=a passfile=/x", false),
        ] {
            let node = Node { connection: Secret::from(connection.to_owned()), prefer: ServerRole::Primary };
            assert_eq!(node.holds_password(), holds, "{connection}");
        }
    }

    #[test]
    fn a_site_of_any_name_has_a_slot() {
        assert_eq!(default_slot("main"), "walden_main");
        assert_eq!(default_slot("My.site-2"), "walden_my_site_2");
        assert_eq!(default_slot(&"x".repeat(64)).len(), SLOT_NAME_LEN_MAX);
    }

    #[test]
    fn the_variables_of_libpq_come_along_and_nothing_else() {
        let node = Node { connection: Secret::from("host=a".to_owned()), prefer: ServerRole::Primary };
        let variables = [("PGUSER", "walden"), ("HOME", "/home/ann"), ("AWS_SECRET_ACCESS_KEY", "hunter2")];
        let options = node.connect_options(&Environment::of(0, &variables)).unwrap();
        assert_eq!(options.conninfo, "host=a");
        let passed: Vec<_> =
            options.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(passed, [("HOME", "/home/ann"), ("PGUSER", "walden")]);
    }
}
