//! Configuration files outside the data directory, which no archive has: read by SQL, where the role may.
//!
//! They stand below `config/` under their full paths, as the walk has them. What the role may not read is told and
//! left out: a basebackup without them restores, with settings from elsewhere.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use bytes::Bytes;
use jiff::Timestamp;

use crate::backup::error::Error;
use crate::backup::server_facts::ServerFacts;
use crate::backup::source::SourceError;
use crate::replication::{Error as SessionError, Param, Session};
use crate::repo::entry::{Entry, Node, TreePath};

/// What was read.
#[derive(Debug, Default)]
pub struct OutsideFiles {
    /// The files, with their places.
    pub files: Vec<(TreePath, Timestamp, Bytes)>,
    /// The directories above them.
    pub entries: Vec<Entry>,
    /// Names below `config/`, in the server's order.
    pub names: Vec<String>,
}

/// No configuration file is larger.
const FILE_BYTES_MAX: i64 = 1 << 20;
/// SQLSTATE `insufficient_privilege`.
const INSUFFICIENT_PRIVILEGE: &str = "42501";

const READ: &str = "SELECT encode(pg_read_binary_file($1, 0, $2), 'hex') AS content, \
     (extract(epoch FROM modification) * 1000000)::bigint AS modified, size AS size FROM pg_stat_file($1)";

/// Reads those of a server's configuration files that are outside its data directory.
pub async fn read_outside(session: &Session, facts: &ServerFacts) -> Result<OutsideFiles, Error> {
    let mut outside = OutsideFiles::default();
    for path in &facts.configuration_files {
        // A relative name is one below the data directory.
        let Some(name) = path.strip_prefix("/").ok().and_then(Path::to_str) else { continue };
        if path.starts_with(facts.data_directory()) || outside.names.iter().any(|known| known == name) {
            continue;
        }
        let text = path.to_string_lossy();
        let row = match session.query_one(READ, &[Param::Text(&text), Param::Int(FILE_BYTES_MAX)]).await {
            Ok(row) => row,
            Err(error) if error.sqlstate() == Some(INSUFFICIENT_PRIVILEGE) => {
                tracing::warn!(
                    "the role may not read \"{text}\" (pg_read_server_files may): it is not in the basebackup"
                );
                continue;
            }
            Err(error @ SessionError::Sql { .. }) => {
                tracing::warn!("\"{text}\" is not in the basebackup: {error}");
                continue;
            }
            Err(error) => return Err(SourceError::from(error).into()),
        };
        let content = row.text("content").map_err(SourceError::from)?;
        let bytes = hex::decode(content)
            .map_err(|error| SourceError::from(SessionError::Unexpected { detail: error.to_string() }))?;
        if row.int("size").map_err(SourceError::from)? > FILE_BYTES_MAX {
            tracing::warn!("\"{text}\" is no configuration file by its size, and not in the basebackup");
            continue;
        }
        let modified = row.timestamp("modified").map_err(SourceError::from)?;
        outside.push(name, modified, bytes.into())?;
    }
    outside.entries.sort_by(|a, b| a.path.cmp(&b.path));
    outside.entries.dedup_by(|a, b| a.path == b.path);
    Ok(outside)
}

impl OutsideFiles {
    fn push(&mut self, name: &str, modified: Timestamp, bytes: Bytes) -> Result<(), Error> {
        let mut above = TreePath::new("config")?;
        for part in Path::new(name).parent().into_iter().flat_map(Path::components) {
            self.push_directory(above.clone(), modified);
            if let Component::Normal(part) = part {
                above = above.join(part.as_bytes())?;
            }
        }
        self.push_directory(above.clone(), modified);
        let file_name = Path::new(name).file_name().unwrap_or_default();
        self.files.push((above.join(file_name.as_bytes())?, modified, bytes));
        self.names.push(name.to_owned());
        Ok(())
    }

    fn push_directory(&mut self, path: TreePath, modified: Timestamp) {
        self.entries.push(Entry { path, mode: 0o700, modified, node: Node::Directory });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_stands_under_its_full_path() {
        let mut outside = OutsideFiles::default();
        outside.push("etc/postgresql/15/main/pg_hba.conf", Timestamp::UNIX_EPOCH, "x".into()).unwrap();
        let directories: Vec<String> = outside.entries.iter().map(|entry| entry.path.to_string()).collect();
        let above = ["config", "config/etc", "config/etc/postgresql", "config/etc/postgresql/15"];
        assert_eq!(directories[..4], above);
        assert_eq!(directories[4], "config/etc/postgresql/15/main");
        assert_eq!(outside.files[0].0.to_string(), "config/etc/postgresql/15/main/pg_hba.conf");
    }
}
