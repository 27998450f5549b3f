//! What is not local yet: a walk through the merged tree.
//!
//! What only the lower has is known to be missing without a look at the disk; of what the upper has, the holes are looked
//! at. Directories get their place on the way, so that every name below them can. What is gone when the walk comes to
//! it is passed over: nothing of it is needed. Names that are moved while the walk goes on may be missed, so whoever
//! wants to know that nothing is missing looks at [`Upper::moves`] before and after.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use nix::errno::Errno;

use crate::disk::Owner;
use crate::mount::caller::Caller;
use crate::mount::fs::{Entry, FileKind, LocalId, Volume};
use crate::mount::lower::{Child, LowerError};
use crate::mount::upper::Upper;
use crate::mount::upper::hydrate::NO_ROOM;
use crate::mount::upper::hydrate::plan::Wanted;
use crate::mount::upper::namespace::Namespace;
use crate::mount::upper::node::{Node, Table};

/// The walk lets others have a turn after so many names.
const NAMES_AT_ONCE: usize = 64;

/// What a walk found.
#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) wanted: Vec<Wanted>,
    /// Whether the walk came to its end.
    pub(crate) is_complete: bool,
    /// Whether every directory of the lower that was listed could be gone into.
    pub(crate) is_steady: bool,
    /// The directories of what is wanted, so that they keep their numbers.
    held: Held,
}

/// References to nodes, given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    upper: Upper,
    nodes: Vec<LocalId>,
}

/// Why something could not be made local.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The store does not answer.
    Store(String),
    /// The disk is full.
    Room,
    /// It may work if it is tried again.
    Unclear(String),
    /// It will not work however often it is tried.
    Lasting(String),
}

/// A name in a directory.
#[derive(Debug)]
struct Listed {
    name: Vec<u8>,
    kind: FileKind,
    /// Its number and size, where only the lower has it.
    only_below: Option<(LocalId, u64)>,
}

impl Survey {
    /// Returns how many bytes are missing.
    pub(crate) fn bytes(&self) -> u64 {
        self.wanted.iter().map(|wanted| wanted.bytes).sum()
    }
}

impl Held {
    /// Holds nothing yet.
    pub(crate) fn new(upper: &Upper) -> Self {
        Self { upper: upper.clone(), nodes: Vec::new() }
    }

    /// Looks a name up and holds what it leads to; nothing where it leads nowhere.
    pub(crate) async fn enter(&mut self, directory: LocalId, name: &[u8]) -> Result<Option<Entry>, Errno> {
        match self.upper.lookup(&Caller::background(), directory, name).await {
            Ok(entry) => {
                self.nodes.push(entry.id);
                Ok(Some(entry))
            }
            Err(errno) if is_gone(errno) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for node in self.nodes.drain(..) {
            self.upper.forget(node, 1);
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Room => f.write_str(NO_ROOM),
            Self::Store(reason) | Self::Unclear(reason) | Self::Lasting(reason) => f.write_str(reason),
        }
    }
}

impl Trouble {
    /// Says what a lower's error means for whoever fetches in the background.
    pub(crate) fn of_lower(error: LowerError) -> Self {
        if error.is_transient() { Self::Store(error.to_string()) } else { Self::Lasting(error.to_string()) }
    }

    /// Says what an error number means that nothing else explains.
    pub(crate) fn of_errno(errno: Errno, name: &[u8]) -> Self {
        match errno {
            Errno::ENOSPC | Errno::EDQUOT => Self::Room,
            errno => Self::Unclear(format!("\"{}\": {errno}", String::from_utf8_lossy(name))),
        }
    }
}

/// Tells whether an error number says that a name leads no longer to what it did.
pub(crate) fn is_gone(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ENOENT | Errno::ESTALE | Errno::ENOTDIR | Errno::EISDIR | Errno::ELOOP | Errno::ENXIO
    )
}

impl Upper {
    /// Returns how often something was moved that a walk may then have missed.
    pub(crate) fn moves(&self) -> u64 {
        self.shared.lock().moves
    }

    /// Walks through the tree, up to `wanted_max` finds; `upper` is what they are marked with.
    ///
    /// With `makes_directories` every directory of the lower gets its place in the upper.
    pub(crate) async fn survey(
        &self,
        upper: usize,
        makes_directories: bool,
        wanted_max: usize,
    ) -> Result<Survey, Trouble> {
        let held = Held::new(self);
        let mut survey = Survey { wanted: Vec::new(), is_complete: true, is_steady: true, held };
        let mut directories = vec![self.root()];
        while let Some(directory) = directories.pop() {
            for (at, listed) in self.listed(directory, makes_directories).await?.into_iter().enumerate() {
                if survey.wanted.len() >= wanted_max {
                    survey.is_complete = false;
                    return Ok(survey);
                }
                if at.is_multiple_of(NAMES_AT_ONCE) {
                    tokio::task::yield_now().await;
                }
                let found = match listed.kind {
                    FileKind::Directory => {
                        let entered = survey.held.enter(directory, &listed.name).await;
                        let entry = self.looked_up(directory, &listed.name, entered).await?;
                        let entry = entry.filter(|entry| entry.attributes.kind == FileKind::Directory);
                        survey.is_steady &= entry.is_some() || listed.only_below.is_none();
                        directories.extend(entry.map(|entry| entry.id));
                        None
                    }
                    FileKind::File | FileKind::Symlink => self.found(directory, &listed).await?,
                    // Only the upper has these.
                    FileKind::Fifo | FileKind::Socket => None,
                };
                let Listed { name, kind, .. } = listed;
                survey.wanted.extend(found.map(|(id, bytes, is_begun)| Wanted {
                    upper,
                    directory,
                    name,
                    id,
                    kind,
                    bytes,
                    is_begun,
                }));
            }
        }
        Ok(survey)
    }

    /// Returns the names in a directory; none once it is gone.
    async fn listed(&self, directory: LocalId, makes_directories: bool) -> Result<Vec<Listed>, Trouble> {
        let Ok(node) = self.node(directory) else { return Ok(Vec::new()) };
        let below = match node.lower.as_ref().filter(|_| node.kind == FileKind::Directory) {
            Some(lower) => self.shared.lower.list(lower.id).await.map_err(Trouble::of_lower)?,
            None => Vec::new(),
        };
        match self.listed_now(directory, makes_directories, &below) {
            Err(errno) if is_gone(errno) && !self.is_there(directory) => Ok(Vec::new()),
            // `lost+found`, where this is not root.
            Err(Errno::EACCES) if node.lower.is_none() && self.is_anothers(directory) => Ok(Vec::new()),
            outcome => {
                let path = node.lower.as_ref().map_or(&b""[..], |lower| lower.path.as_slice());
                outcome.map_err(|errno| Trouble::of_errno(errno, path))
            }
        }
    }

    fn is_anothers(&self, directory: LocalId) -> bool {
        let attributes = self.shared.lock().attributes(directory);
        attributes.is_ok_and(|found| found.owner.uid != Owner::current().uid)
    }

    fn listed_now(
        &self,
        directory: LocalId,
        makes_directories: bool,
        below: &[Child],
    ) -> Result<Vec<Listed>, Errno> {
        let mut namespace = self.shared.lock();
        if makes_directories {
            namespace.materialize_directory(directory)?;
        }
        namespace.listed(directory, below)
    }

    /// Returns number, missing bytes and whether the upper has it, where something is missing.
    async fn found(
        &self,
        directory: LocalId,
        listed: &Listed,
    ) -> Result<Option<(LocalId, u64, bool)>, Trouble> {
        if let Some((id, bytes)) = listed.only_below {
            return Ok(Some((id, if listed.kind == FileKind::File { bytes } else { 0 }, false)));
        }
        if listed.kind == FileKind::Symlink {
            return Ok(None);
        }
        let mut held = Held::new(self);
        let entered = held.enter(directory, &listed.name).await;
        let entry = self.looked_up(directory, &listed.name, entered).await?;
        let Some(entry) = entry.filter(|entry| entry.attributes.kind == FileKind::File) else {
            return Ok(None);
        };
        match self.missing_bytes(entry.id) {
            Ok(0) => Ok(None),
            Ok(bytes) => Ok(Some((entry.id, bytes, true))),
            Err(errno) if is_gone(errno) && !self.is_there(entry.id) => Ok(None),
            Err(errno) => Err(Trouble::of_errno(errno, &listed.name)),
        }
    }

    /// Explains a look-up that failed.
    async fn looked_up<T>(
        &self,
        directory: LocalId,
        name: &[u8],
        found: Result<T, Errno>,
    ) -> Result<T, Trouble> {
        match found {
            Ok(found) => Ok(found),
            Err(errno) => Err(self.cause_of_lookup(directory, name, errno).await),
        }
    }

    /// Finds out why a name could not be looked up.
    pub(super) async fn cause_of_lookup(&self, directory: LocalId, name: &[u8], errno: Errno) -> Trouble {
        let directory = self.node(directory).ok().and_then(|node| node.lower.as_ref().map(|lower| lower.id));
        let Some(directory) = directory else { return Trouble::of_errno(errno, name) };
        match self.shared.lower.lookup(directory, name).await {
            Err(error) => Trouble::of_lower(error),
            Ok(_) => Trouble::of_errno(errno, name),
        }
    }

    /// Tells whether a name leads to a node.
    fn is_there(&self, id: LocalId) -> bool {
        let namespace = self.shared.lock();
        let has_name = namespace.table.get(id).is_ok_and(|record| !record.names.is_empty());
        has_name || id == namespace.table.root()
    }

    /// Returns how many bytes of a file that the upper has are not local.
    fn missing_bytes(&self, id: LocalId) -> Result<u64, Errno> {
        let file = self.open_file(id)?;
        let Some(content) = file.node.content.as_ref().filter(|content| content.lower_node().is_some())
        else {
            return Ok(0);
        };
        if !content.is_mapped() {
            self.shared.lock().open_in_upper(id)?;
        }
        Ok(content.missing(&(0..u64::MAX)).iter().map(|gap| gap.end - gap.start).sum())
    }

    /// Returns what never changes about a node.
    pub(crate) fn node(&self, id: LocalId) -> Result<Arc<Node>, Errno> {
        Ok(self.shared.lock().table.get(id)?.node.clone())
    }
}

impl Namespace {
    /// Lists what can be seen in a directory, the upper's own included; `below` are the lower's children.
    fn listed(&self, directory: LocalId, below: &[Child]) -> Result<Vec<Listed>, Errno> {
        let upper: HashMap<Vec<u8>, FileKind> = self.upper_names(directory)?.into_iter().collect();
        let mut listed = Vec::with_capacity(below.len().max(upper.len()));
        for (name, node, child) in below {
            let is_visible =
                self.lower_path(directory, name)?.is_some() && !self.is_reserved(directory, name);
            if is_visible && !upper.contains_key(name) {
                let only_below = Some((Table::id_of(*node)?, child.size));
                listed.push(Listed { name: name.clone(), kind: child.kind.into(), only_below });
            }
        }
        listed.extend(upper.into_iter().map(|(name, kind)| Listed { name, kind, only_below: None }));
        Ok(listed)
    }
}
