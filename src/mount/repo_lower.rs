//! A part of a basebackup as a lower: `data`, `tablespaces` or `config`, read through the repository's file reader.
//!
//! Nodes are numbered as in the file table, so that nothing is remembered between calls and a basebackup that was
//! closed for want of memory is simply opened again. Two things are added to what is stored: the part's own root,
//! and in `pg_tblspc` the links, which point to `tablespaces` beside `data` and never to where the source had them.
//! `tablespace_map` is never shown: with it the server would make links to the source's directories. Where a server
//! writes, WAL that the basebackup carries is not shown either: its `pg_wal` is a directory of its own.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use jiff::Timestamp;

use crate::mount::lower::{Child, Lower, LowerError, Node, NodeId, NodeKind, Piece, PieceSink};
use crate::repo::entry::{self, Entry, TreePath};
use crate::repo::manifest::Tablespace;
use crate::repo::{self, ErrorKind, FileReader, Urgency};
use crate::storage;

/// Gives the reader of one basebackup, opening it if need be.
#[async_trait::async_trait]
pub trait ReaderSource: Send + Sync + Debug {
    /// Returns the reader.
    async fn reader(&self) -> Result<Arc<FileReader>, repo::Error>;
}

/// A part of a basebackup.
#[derive(Debug)]
pub struct RepoLower {
    source: Arc<dyn ReaderSource>,
    root: TreePath,
    tablespace_folder: Vec<u8>,
    tablespace_places: BTreeMap<u32, Vec<u8>>,
    shows_wal: bool,
}

/// A reader that is open already.
#[derive(Debug)]
struct OpenReader(Arc<FileReader>);

/// The root of the part, whatever its number in the file table.
const ROOT: NodeId = NodeId::MAX;
/// Links of `pg_tblspc` count down from here, in the order of the manifest; far above any file table.
const LINK_LAST: u64 = NodeId::MAX.0 - 1;
/// More tablespaces than any cluster has; what is numbered above is a link.
const LINKS_MAX: u64 = 1 << 20;
const TABLESPACE_LINKS: &[u8] = b"data/pg_tblspc";
const TABLESPACE_MAP: &[u8] = b"data/tablespace_map";
const WAL_FOLDER: &[u8] = b"data/pg_wal";
/// From `data/pg_tblspc` to the folder of tablespaces beside `data`.
const TABLESPACE_FOLDER: &[u8] = b"../../tablespaces/";

impl RepoLower {
    /// Shows what is below `root` of an open basebackup: `data`, `tablespaces`, `config`, or a directory in them.
    pub fn new(reader: Arc<FileReader>, root: TreePath) -> Self {
        Self::opened_by(Arc::new(OpenReader(reader)), root)
    }

    /// Shows what is below `root` of a basebackup that `source` opens when it is needed.
    pub fn opened_by(source: Arc<dyn ReaderSource>, root: TreePath) -> Self {
        let tablespace_folder = TABLESPACE_FOLDER.to_vec();
        Self { source, root, tablespace_folder, tablespace_places: BTreeMap::new(), shows_wal: true }
    }

    /// Shows no file of `pg_wal`.
    pub fn without_wal(self) -> Self {
        Self { shows_wal: false, ..self }
    }

    /// Lets the links of `pg_tblspc` lead into another folder, whose path ends in a slash.
    pub fn with_tablespace_folder(self, folder: &[u8]) -> Self {
        Self { tablespace_folder: folder.to_vec(), ..self }
    }

    /// Lets links of `pg_tblspc` lead to places of their own, by oid.
    pub fn with_tablespace_places(self, tablespace_places: BTreeMap<u32, Vec<u8>>) -> Self {
        Self { tablespace_places, ..self }
    }

    /// Returns where the link of a tablespace leads.
    fn target_of(&self, tablespace: &Tablespace) -> Vec<u8> {
        match self.tablespace_places.get(&tablespace.oid) {
            Some(place) => place.clone(),
            None => [&self.tablespace_folder, tablespace.oid.to_string().as_bytes()].concat(),
        }
    }

    /// Tells whether something that is stored is not shown.
    fn is_hidden(&self, entry: &Entry) -> bool {
        let is_wal =
            || entry.path.strip(WAL_FOLDER).is_some() && matches!(entry.node, entry::Node::File { .. });
        entry.path.as_bytes() == TABLESPACE_MAP || (!self.shows_wal && is_wal())
    }

    async fn reader(&self) -> Result<Arc<FileReader>, LowerError> {
        self.source.reader().await.map_err(|error| lower_error(&error))
    }

    async fn path_of(&self, reader: &FileReader, node: NodeId) -> Result<TreePath, LowerError> {
        if node == ROOT {
            return Ok(self.root.clone());
        }
        Ok(entry_of(reader, node).await?.path)
    }

    /// Returns the links of `pg_tblspc`, if that is what `directory` is.
    fn links(&self, reader: &FileReader, directory: &TreePath) -> Vec<(Vec<u8>, NodeId, Node)> {
        if directory.as_bytes() != TABLESPACE_LINKS {
            return Vec::new();
        }
        let link = |(n, tablespace): (u64, &Tablespace)| {
            let name = tablespace.oid.to_string().into_bytes();
            let size = self.target_of(tablespace).len() as u64;
            let mtime = reader.basebackup().record().started_at;
            let node = Node { kind: NodeKind::Symlink, mode: 0o777, size, mtime };
            (name, NodeId(LINK_LAST - n), node)
        };
        let tablespaces = &reader.basebackup().start().tablespaces;
        // An in-place tablespace is a directory of pg_tblspc and has no location.
        (0..LINKS_MAX).zip(tablespaces).filter(|(_, t)| !t.location.is_empty()).map(link).collect()
    }
}

#[async_trait::async_trait]
impl ReaderSource for OpenReader {
    async fn reader(&self) -> Result<Arc<FileReader>, repo::Error> {
        Ok(self.0.clone())
    }
}

#[async_trait::async_trait]
impl Lower for RepoLower {
    fn root(&self) -> NodeId {
        ROOT
    }

    async fn node(&self, node: NodeId) -> Result<Node, LowerError> {
        let reader = self.reader().await?;
        if node == ROOT {
            let found = reader.basebackup().entry(&self.root).await.map_err(|error| lower_error(&error))?;
            let made = || directory_made_at(reader.basebackup().record().started_at);
            return Ok(found.map_or_else(made, |(_, entry)| node_of(&entry)));
        }
        if let Some(tablespace) = tablespace_of(&reader, node) {
            let links = self.links(&reader, &TreePath::new(TABLESPACE_LINKS).map_err(contract)?);
            let name = tablespace.oid.to_string().into_bytes();
            let found = links.into_iter().find(|(linked, ..)| *linked == name);
            return found.map(|(.., node)| node).ok_or_else(|| no_node(node));
        }
        Ok(node_of(&entry_of(&reader, node).await?))
    }

    async fn lookup(&self, directory: NodeId, name: &[u8]) -> Result<Option<(NodeId, Node)>, LowerError> {
        let reader = self.reader().await?;
        let above = self.path_of(&reader, directory).await?;
        // A name that is no name of a path is not there.
        let Ok(path) = above.join(name) else { return Ok(None) };
        if let Some((_, id, node)) =
            self.links(&reader, &above).into_iter().find(|(linked, ..)| linked == name)
        {
            return Ok(Some((id, node)));
        }
        let found = reader.basebackup().entry(&path).await.map_err(|error| lower_error(&error))?;
        let shown = found.filter(|(_, entry)| !self.is_hidden(entry));
        Ok(shown.map(|(number, entry)| (NodeId(number), node_of(&entry))))
    }

    async fn list(&self, directory: NodeId) -> Result<Vec<Child>, LowerError> {
        let reader = self.reader().await?;
        let above = self.path_of(&reader, directory).await?;
        let stored = reader.basebackup().children(&above).await.map_err(|error| lower_error(&error))?;
        let mut children = self.links(&reader, &above);
        // Only a link of ours can stand where something is stored; among the many that are stored no two have one name.
        let links = children.len();
        for (number, entry) in stored.iter().filter(|(_, entry)| !self.is_hidden(entry)) {
            let name = entry.path.split().1;
            if children[..links].iter().all(|(linked, ..)| linked != name) {
                children.push((name.to_vec(), NodeId(*number), node_of(entry)));
            }
        }
        Ok(children)
    }

    async fn read_link(&self, node: NodeId) -> Result<Vec<u8>, LowerError> {
        let reader = self.reader().await?;
        if let Some(tablespace) = tablespace_of(&reader, node) {
            return Ok(self.target_of(tablespace));
        }
        match entry_of(&reader, node).await?.node {
            entry::Node::Symlink(target) => Ok(target),
            _ => Err(no_node(node)),
        }
    }

    async fn fetch_each(
        &self,
        node: NodeId,
        ranges: &[Range<u64>],
        urgency: Urgency,
        sink: &dyn PieceSink,
    ) -> Result<(), LowerError> {
        let reader = self.reader().await?;
        let entry = entry_of(&reader, node).await?;
        let take = |pieces: Vec<repo::Piece>| -> ControlFlow<()> {
            let piece = |repo::Piece { offset, bytes }| Piece { offset, bytes };
            sink.take(pieces.into_iter().map(piece).collect())
        };
        reader.fetch_each(&entry, ranges, urgency, &take).await.map_err(|error| lower_error(&error))
    }
}

/// Says what a repository's error means to a mount.
pub fn lower_error(error: &repo::Error) -> LowerError {
    let whole = || error.to_string();
    match error {
        repo::Error::Damaged { object, detail } => {
            LowerError::Damaged { object: object.clone(), detail: detail.clone() }
        }
        repo::Error::Untrusted { object, detail } => {
            LowerError::Untrusted { object: object.clone(), detail: detail.clone() }
        }
        repo::Error::NoPrivateKey { object, .. }
        | repo::Error::WrongKey { object }
        | repo::Error::Unencrypted { object }
        | repo::Error::NewerFormat { object, .. } => {
            LowerError::Untrusted { object: object.clone(), detail: whole() }
        }
        repo::Error::Store(error) => match error.kind() {
            storage::ErrorKind::NotFound => LowerError::Missing { object: error.key().to_owned() },
            storage::ErrorKind::Truncated | storage::ErrorKind::TooLarge => {
                LowerError::Damaged { object: error.key().to_owned(), detail: error.to_string() }
            }
            _ => LowerError::Unreachable { object: error.key().to_owned(), detail: error.to_string() },
        },
        _ if error.kind() == ErrorKind::Bug => LowerError::Contract { detail: whole() },
        _ => LowerError::Missing { object: whole() },
    }
}

async fn entry_of(reader: &FileReader, node: NodeId) -> Result<Entry, LowerError> {
    let found = reader.basebackup().entry_by_number(node.0).await.map_err(|error| lower_error(&error))?;
    found.ok_or_else(|| no_node(node))
}

fn tablespace_of(reader: &FileReader, node: NodeId) -> Option<&Tablespace> {
    let n = LINK_LAST.checked_sub(node.0).filter(|n| *n < LINKS_MAX)?;
    reader.basebackup().start().tablespaces.get(n as usize)
}

fn node_of(entry: &Entry) -> Node {
    let kind = match entry.node {
        entry::Node::Directory => NodeKind::Directory,
        entry::Node::Symlink(_) => NodeKind::Symlink,
        entry::Node::File { .. } => NodeKind::File,
    };
    Node { kind, mode: entry.mode, size: entry.size(), mtime: entry.modified }
}

fn directory_made_at(mtime: Timestamp) -> Node {
    Node { kind: NodeKind::Directory, mode: 0o700, size: 0, mtime }
}

fn no_node(node: NodeId) -> LowerError {
    LowerError::Contract { detail: format!("{node:?} is not in this part of the basebackup, or is no link") }
}

fn contract(error: entry::InvalidPath) -> LowerError {
    LowerError::Contract { detail: error.to_string() }
}
