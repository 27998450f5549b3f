//! `walden show BACKUP [--files]`: one basebackup, and what is in it.
//!
//! Without `--files` the signed record and names of WAL segments are enough and no private key is needed; with it the file table is read, block
//! by block, and printed whole: a million files take some hundred megabytes for a moment.

use std::fmt;
use std::fmt::Write;

use clap::Args;
use serde::Serialize;

use crate::catalog::basebackups::list;
use crate::catalog::recoverable::recoverability_of;
use crate::config::KeyPurpose;
use crate::repo::{
    Basebackup, Repository,
    entry::{Entry, Node},
    manifest::Tablespace,
};

use super::context::Context;
use super::error::CommandError;
use super::list::ListedRow;
use super::output::Report;
use super::text::{Align, TextStyle, TextTable};

/// Shows a basebackup
#[derive(Debug, Args)]
pub struct Show {
    /// latest, latest~1, an id, its unique prefix, or a label
    #[arg(value_name = "BACKUP")]
    backup: String,

    /// Lists its files as well, which takes a private key where it is encrypted
    #[arg(long)]
    files: bool,
}

impl Show {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let site = context.site()?;
        let purpose = if self.files { KeyPurpose::Read } else { KeyPurpose::Inspect };
        let report = context.block_on_one_thread(async {
            let repository = context.open_repository(site, purpose).await?;
            let found = list(&repository).await?;
            let listed = found.resolve(&self.backup)?;
            let content =
                if self.files { Some(read_content(&repository, listed.record.id).await?) } else { None };
            let worth = recoverability_of(&repository, listed).await?;
            Ok::<_, CommandError>(ShowReport { basebackup: ListedRow::of(listed, worth), content })
        })??;
        context.output.print(&report)
    }
}

async fn read_content(
    repository: &Repository,
    id: crate::repo::BasebackupId,
) -> Result<ContentReport, CommandError> {
    let basebackup = Basebackup::open(repository, id).await?;
    let mut files = Vec::new();
    for n in 0..basebackup.block_count() {
        files.extend(basebackup.block(n).await?.iter().map(FileRow::from));
    }
    let tablespaces = basebackup.start().tablespaces.iter().map(TablespaceRow::from).collect();
    Ok(ContentReport { tablespaces, files })
}

/// What `walden show` prints.
#[derive(Debug, Serialize)]
struct ShowReport {
    #[serde(flatten)]
    basebackup: ListedRow,
    #[serde(flatten)]
    content: Option<ContentReport>,
}

#[derive(Debug, Serialize)]
struct ContentReport {
    tablespaces: Vec<TablespaceRow>,
    files: Vec<FileRow>,
}

#[derive(Debug, Serialize)]
struct TablespaceRow {
    oid: u32,
    name: String,
    location: String,
}

#[derive(Debug, Serialize)]
struct FileRow {
    path: String,
    kind: &'static str,
    mode: String,
    modified: jiff::Timestamp,
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

impl From<&Tablespace> for TablespaceRow {
    fn from(tablespace: &Tablespace) -> Self {
        let location = String::from_utf8_lossy(&tablespace.location).into_owned();
        Self { oid: tablespace.oid, name: tablespace.name.clone(), location }
    }
}

impl From<&Entry> for FileRow {
    fn from(entry: &Entry) -> Self {
        let (kind, target) = match &entry.node {
            Node::Directory => ("directory", None),
            Node::File { .. } => ("file", None),
            Node::Symlink(target) => ("link", Some(String::from_utf8_lossy(target).into_owned())),
        };
        Self {
            path: entry.path.to_string(),
            kind,
            mode: format!("{:04o}", entry.mode),
            modified: entry.modified,
            size: entry.size(),
            target,
        }
    }
}

impl Report for ShowReport {
    fn write_text(&self, out: &mut String, style: &TextStyle) -> fmt::Result {
        self.basebackup.write_details(out, style)?;
        let Some(content) = &self.content else {
            return Ok(());
        };
        for TablespaceRow { oid, name, location } in &content.tablespaces {
            writeln!(out, "tablespace {oid} \"{name}\" at \"{location}\"")?;
        }
        writeln!(out)?;
        let mut table = TextTable::new(&[
            ("MODE", Align::Left),
            ("SIZE", Align::Right),
            ("MODIFIED", Align::Left),
            ("PATH", Align::Left),
        ]);
        for file in &content.files {
            let kind = match file.kind {
                "directory" => "d",
                "link" => "l",
                _ => "-",
            };
            // A name may hold a line end; escaped it stays on its line.
            let mut path = file.path.escape_debug().to_string();
            if let Some(target) = &file.target {
                write!(path, " -> {}", target.escape_debug())?;
            }
            table.row([
                format!("{kind}{}", file.mode),
                file.size.to_string(),
                style.time(file.modified),
                path,
            ]);
        }
        table.write(out);
        Ok(())
    }
}
