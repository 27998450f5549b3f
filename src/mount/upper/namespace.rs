//! The merged tree: what of the lower is still visible, with the upper's own in front.
//!
//! A name is the upper's if the upper has it; else it is the lower's unless the journal hides it. A directory of the
//! upper that came from the lower (its origin says from where) shows the lower's children too; one made here does
//! not. Two files are held back: their names lead into the private area, so that the bare upper cannot be started.
//!
//! Synchronous and under one lock. What the lower says (`Below`) is asked before and passed in: it never changes, so
//! only what can change, the journal and the upper, is looked at here.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;

use crate::disk::Owner;
use crate::disk::private_area::{DIRECTORY_NAME, HELD_BACK};
use crate::mount::errno;
use crate::mount::fs::{Attributes, FileKind, ListEntry, LocalId};
use crate::mount::lower::{self, NodeId, NodeKind};
use crate::mount::lower_volume;
use crate::mount::upper::content::Content;
use crate::mount::upper::journal::NamesJournal;
use crate::mount::upper::local_disk::{LocalDirectory, LocalDisk, LocalFile, Times};
use crate::mount::upper::node::{LowerNode, Node, Table};
use crate::mount::upper::origin::{self, Origin};
use crate::mount::upper::stable::Stable;
use crate::mount::upper::stats::Counters;

/// What the lower has under a name.
pub(crate) type Below = Option<(NodeId, lower::Node)>;

/// What came of looking a name up.
#[derive(Debug)]
pub(crate) enum Entered {
    Known(LocalId),
    Absent,
    /// The upper has it, and it came from elsewhere in the lower: find that first.
    NeedsOrigin(Vec<u8>),
}

/// The merged tree.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(super) disk: Arc<dyn LocalDisk>,
    pub(super) journal: NamesJournal,
    pub(super) table: Table,
    /// Who owns what is only in the lower, and what is made in its name.
    pub(super) owner: Owner,
    /// Files that wait in the private area, each with its name there.
    pub(super) held: Vec<(&'static str, &'static str)>,
    /// Nothing of the lower is visible any more that the upper does not have.
    pub(super) is_alone: bool,
    pub(super) counters: Arc<Counters>,
    pub(super) stable: Arc<Stable>,
    /// Names that came to lead to something of the lower, or to a directory with such things in it.
    pub(super) moves: u64,
    next_temporary: u64,
}

impl Namespace {
    /// Puts a tree together over an upper whose private area exists.
    pub(crate) fn new(
        disk: Arc<dyn LocalDisk>,
        journal: NamesJournal,
        root: LowerNode,
        owner: Owner,
        holds_back: bool,
        counters: Arc<Counters>,
        stable: Arc<Stable>,
    ) -> Result<Self, Errno> {
        let id = Table::id_of(root.id)?;
        let root = Node { id, kind: FileKind::Directory, lower: Some(root), content: None };
        let (table, moves, next_temporary) = (Table::new(root), 0, 0);
        let mut held = Vec::new();
        for (place, name) in HELD_BACK.iter().filter(|_| holds_back) {
            // One that has come to its place waits no more: of the other place the lower would be seen.
            if disk.stat(Path::new(place)).map_err(of_io)?.is_none() {
                held.push((*place, *name));
            }
        }
        let is_alone = false;
        Ok(Self { disk, journal, table, owner, held, is_alone, counters, stable, moves, next_temporary })
    }

    /// Returns the path in the lower of a directory's name, if it could be visible from there.
    pub(crate) fn lower_path(
        &self,
        directory: LocalId,
        name: &[u8],
    ) -> Result<Option<(NodeId, Vec<u8>)>, Errno> {
        if self.is_alone {
            return Ok(None);
        }
        let Some(lower) = &self.table.get(directory)?.node.lower else { return Ok(None) };
        let path = origin::join(&lower.path, name);
        Ok(Some((lower.id, path)).filter(|(_, path)| !self.journal.is_hidden(path)))
    }

    /// Enters a name into the table, if it stands for something; `moved` answers an earlier `NeedsOrigin`.
    pub(crate) fn enter(
        &mut self,
        directory: LocalId,
        name: &[u8],
        below: &Below,
        moved: Option<&LowerNode>,
    ) -> Result<Entered, Errno> {
        if let Some(id) = self.table.at(directory, name) {
            return Ok(Entered::Known(id));
        }
        let here = self.lower_path(directory, name)?.zip(*below).map(|((_, path), (id, node))| LowerNode {
            id,
            path,
            node,
        });
        let place = self.place(directory, name)?;
        let Some(stat) = self.disk.stat(&place).map_err(of_io)? else {
            let Some(lower) = here else { return Ok(Entered::Absent) };
            return self.insert_lower(directory, name, lower).map(Entered::Known);
        };
        if let Some(id) = self.table.with_inode(stat.inode) {
            self.table.add_name(id, directory, name.to_vec());
            return Ok(Entered::Known(id));
        }
        let kind = stat.attributes.kind;
        let came_from = match kind {
            FileKind::File | FileKind::Directory => self.disk.origin(&place).map_err(of_io)?,
            FileKind::Symlink | FileKind::Fifo | FileKind::Socket => None,
        };
        let name = Some((directory, name.to_vec()));
        let Some(came_from) = came_from.filter(|_| !self.is_alone) else {
            self.give_what_was_left(&place, stat.attributes.owner, kind, stat.attributes.size)?;
            let content = (kind == FileKind::File).then(|| Content::native(None));
            let node = Node { id: self.table.native_id(), kind, lower: None, content };
            return Ok(Entered::Known(self.table.insert(node, name, true, Some(stat.inode))));
        };
        let came_from = Origin::from_bytes(&came_from).map_err(of_io)?;
        let Some(lower) =
            [here.as_ref(), moved].into_iter().flatten().find(|lower| lower.path == came_from.path)
        else {
            return Ok(Entered::NeedsOrigin(came_from.path));
        };
        let content = (kind == FileKind::File).then(|| Content::partly_local(lower.id, lower.path.clone()));
        let node = Node { id: Table::id_of(lower.id)?, kind, lower: Some(lower.clone()), content };
        Ok(Entered::Known(self.table.insert(node, name, true, Some(stat.inode))))
    }

    /// Gives away what a process that was killed has made and not yet given to who asked for it: root's, and empty.
    /// Nobody else could open it, and PostgreSQL's redo wants to make or open it at every start.
    fn give_what_was_left(&self, place: &Path, found: Owner, kind: FileKind, size: u64) -> Result<(), Errno> {
        if self.owner.is_root() || !found.is_root() {
            return Ok(());
        }
        let is_empty = match kind {
            FileKind::File => size == 0,
            FileKind::Directory => self.disk.list(place).map_err(of_io)?.is_empty(),
            FileKind::Symlink | FileKind::Fifo | FileKind::Socket => false,
        };
        if is_empty { self.disk.give(place, self.owner).map_err(of_io) } else { Ok(()) }
    }

    fn insert_lower(&mut self, directory: LocalId, name: &[u8], lower: LowerNode) -> Result<LocalId, Errno> {
        let content = (lower.node.kind == NodeKind::File)
            .then(|| Content::of_lower(lower.id, lower.path.clone(), lower.node.size));
        let node =
            Node { id: Table::id_of(lower.id)?, kind: lower.node.kind.into(), lower: Some(lower), content };
        Ok(self.table.insert(node, Some((directory, name.to_vec())), false, None))
    }

    /// Returns what `stat` shows.
    pub(crate) fn attributes(&self, id: LocalId) -> Result<Attributes, Errno> {
        let record = self.table.get(id)?;
        let node = &record.node;
        if let Some(content) = &node.content
            && let Some(file) = content.file()
        {
            let found = file.stat().map_err(of_io)?.attributes;
            return Ok(shown(found, content.base_length()));
        }
        if record.in_upper && !record.names.is_empty() {
            let found = self.disk.stat(&self.place_of(id)?).map_err(of_io)?.ok_or(Errno::ENOENT)?.attributes;
            let base = node.lower.as_ref().map_or(0, |lower| lower.node.size);
            return Ok(shown(found, base));
        }
        let lower = node.lower.as_ref().ok_or(Errno::ESTALE)?;
        let links = u32::from(!record.names.is_empty());
        Ok(Attributes { links, ..lower_volume::attributes(&lower.node, self.owner) })
    }

    /// Lists the merged directory; `below` are the lower's children.
    pub(crate) fn list(&self, id: LocalId, below: &[lower::Child]) -> Result<Vec<ListEntry>, Errno> {
        let mut entries = Vec::with_capacity(below.len());
        for (name, node, child) in below {
            if self.lower_path(id, name)?.is_some() && !self.is_reserved(id, name) {
                entries.push((name.clone(), Table::id_of(*node)?, child.kind.into()));
            }
        }
        // A name of the upper comes after and wins.
        for (name, kind) in self.upper_names(id)? {
            entries.push((name.clone(), self.table.at(id, &name).unwrap_or(id), kind));
        }
        let mut merged = std::collections::BTreeMap::new();
        for (name, number, kind) in entries {
            merged.insert(name, (number, kind));
        }
        Ok(merged.into_iter().map(|(name, (id, kind))| ListEntry { name, id, kind }).collect())
    }

    /// Tells whether a directory shows nothing; `below` are the lower's children.
    pub(crate) fn is_empty(&self, id: LocalId, below: &[lower::Child]) -> Result<bool, Errno> {
        for (name, ..) in below {
            if self.lower_path(id, name)?.is_some() {
                return Ok(false);
            }
        }
        Ok(self.upper_names(id)?.is_empty())
    }

    /// Returns the names the upper has in a directory, those held back included.
    pub(super) fn upper_names(&self, id: LocalId) -> Result<Vec<(Vec<u8>, FileKind)>, Errno> {
        let record = self.table.get(id)?;
        if record.names.is_empty() && !self.is_root(id) {
            return Ok(Vec::new());
        }
        let path = self.table.path(id)?;
        let mut names =
            if record.in_upper { self.disk.list(&self.actual(&path)).map_err(of_io)? } else { Vec::new() };
        names.retain(|(name, _)| !self.is_reserved(id, name));
        for (place, _) in &self.held {
            let place = Path::new(place);
            if place.parent() == Some(&path)
                && let Some(name) = place.file_name()
                && let Some(held) = self.disk.stat(&self.actual(place)).map_err(of_io)?
            {
                names.push((name.as_bytes().to_vec(), held.attributes.kind));
            }
        }
        Ok(names)
    }

    /// Tells whether a name is Walden's own.
    pub(crate) fn is_reserved(&self, directory: LocalId, name: &[u8]) -> bool {
        self.is_root(directory) && name == DIRECTORY_NAME.as_bytes()
    }

    fn is_root(&self, id: LocalId) -> bool {
        id == self.table.root()
    }

    /// Returns where in the upper a name is, or would be.
    pub(super) fn place(&self, directory: LocalId, name: &[u8]) -> Result<PathBuf, Errno> {
        let path = self.table.path(directory)?.join(std::ffi::OsStr::from_bytes(name));
        Ok(self.actual(&path))
    }

    /// Returns where in the upper a node is.
    pub(super) fn place_of(&self, id: LocalId) -> Result<PathBuf, Errno> {
        Ok(self.actual(&self.table.path(id)?))
    }

    /// Leads the files held back into the private area, with all below them should somebody put directories there.
    fn actual(&self, path: &Path) -> PathBuf {
        let mut leads =
            self.held.iter().filter_map(|(place, name)| Some((name, path.strip_prefix(place).ok()?)));
        match leads.next() {
            Some((name, below)) if below.as_os_str().is_empty() => held_place(name),
            Some((name, below)) => held_place(name).join(below),
            None => path.to_owned(),
        }
    }

    /// Gives a directory a place in the upper, and those above it.
    pub(super) fn materialize_directory(&mut self, id: LocalId) -> Result<(), Errno> {
        let record = self.table.get(id)?;
        if record.in_upper {
            return Ok(());
        }
        let lower = record.node.lower.clone().ok_or(Errno::ESTALE)?;
        let temporary = self.temporary();
        self.disk.make_directory(&temporary, lower.node.mode & 0o7777).map_err(of_io)?;
        let origin = Origin { base_length: 0, path: lower.path.clone() };
        origin.to_bytes().and_then(|bytes| self.disk.set_origin(&temporary, &bytes)).map_err(of_io)?;
        self.disk.give(&temporary, self.owner).map_err(of_io)?;
        self.disk.set_times(&temporary, Times::modified(lower.node.mtime.into())).map_err(of_io)?;
        self.move_into_place(id, &temporary)
    }

    /// Gives a symbolic link of the lower a place in the upper.
    pub(super) fn materialize_symlink(&mut self, id: LocalId, target: &[u8]) -> Result<(), Errno> {
        let record = self.table.get(id)?;
        if record.in_upper {
            return Ok(());
        }
        let mtime = record.node.lower.as_ref().ok_or(Errno::ESTALE)?.node.mtime;
        let temporary = self.temporary();
        self.disk.make_symlink(target, &temporary).map_err(of_io)?;
        self.disk.give(&temporary, self.owner).map_err(of_io)?;
        self.disk.set_times(&temporary, Times::modified(mtime.into())).map_err(of_io)?;
        self.move_into_place(id, &temporary)
    }

    /// Returns a file's open file in the upper, opening it or giving it a place there first.
    pub(super) fn materialize_file(&mut self, id: LocalId) -> Result<Arc<dyn LocalFile>, Errno> {
        let record = self.table.get(id)?;
        let node = record.node.clone();
        let content = node.content.as_ref().ok_or(Errno::EISDIR)?;
        if let Some(file) = content.file() {
            return Ok(file);
        }
        if record.in_upper {
            return self.open_in_upper(id);
        }
        let lower = node.lower.as_ref().ok_or(Errno::ESTALE)?;
        let removed = record.names.is_empty();
        let temporary = self.temporary();
        let made = self.make_sparse(&temporary, lower).map_err(of_io);
        let file = made.inspect_err(|_| drop(self.disk.remove_file(&temporary)))?;
        if removed {
            // Nobody can find it any more, but who has it open goes on reading it.
            self.disk.remove_file(&temporary).map_err(of_io)?;
        } else {
            self.move_into_place(id, &temporary)?;
        }
        content.attach(file.clone(), lower.node.size).map_err(of_io)?;
        Ok(file)
    }

    /// Creates a file of the right size with nothing in it. The name it is created under does not count yet, so a
    /// crash leaves all of its attributes or none of it: the file system keeps their order.
    fn make_sparse(&self, path: &Path, lower: &LowerNode) -> io::Result<Arc<dyn LocalFile>> {
        let file = self.disk.create(path, lower.node.mode & 0o7777)?;
        let origin = Origin { base_length: lower.node.size, path: lower.path.clone() };
        file.set_origin(&origin.to_bytes()?)?;
        file.set_length(lower.node.size)?;
        self.disk.give(path, self.owner)?;
        file.set_times(Times::modified(lower.node.mtime.into()))?;
        Ok(file)
    }

    /// Opens a file that the upper has.
    pub(super) fn open_in_upper(&mut self, id: LocalId) -> Result<Arc<dyn LocalFile>, Errno> {
        let place = self.place_of(id)?;
        let node = self.table.get(id)?.node.clone();
        let content = node.content.as_ref().ok_or(Errno::EISDIR)?;
        if let Some(file) = content.file() {
            return Ok(file);
        }
        let file = self.disk.open(&place).map_err(of_io)?;
        let base_length = match (&node.lower, content.is_mapped()) {
            (Some(_), false) if !self.is_alone => {
                let origin = self.disk.origin(&place).map_err(of_io)?.ok_or(Errno::EIO)?;
                Origin::from_bytes(&origin).map_err(of_io)?.base_length
            }
            _ => 0,
        };
        if base_length > 0 && !self.stable.is_whole() {
            // What a power cut left allocated and unwritten is data while it is cached, and a hole again without.
            file.drop_cache().map_err(of_io)?;
        }
        content.attach(file.clone(), base_length).map_err(of_io)?;
        Ok(file)
    }

    /// Moves what was made under a temporary name to where a node belongs.
    fn move_into_place(&mut self, id: LocalId, temporary: &Path) -> Result<(), Errno> {
        self.try_move_into_place(id, temporary).inspect_err(|_| {
            let _ = self.disk.remove_file(temporary).or_else(|_| self.disk.remove_directory(temporary));
        })
    }

    fn try_move_into_place(&mut self, id: LocalId, temporary: &Path) -> Result<(), Errno> {
        let (directory, _) = self.table.get(id)?.names.first().ok_or(Errno::ENOENT)?.clone();
        self.materialize_directory(directory)?;
        let place = self.place_of(id)?;
        let parent = self.place_of(directory)?;
        let modified = self.disk.stat(&parent).map_err(of_io)?.ok_or(Errno::ENOENT)?.attributes.mtime;
        self.disk.rename(temporary, &place).map_err(of_io)?;
        // Looking at a directory must not make it look changed.
        self.disk.set_times(&parent, Times::modified(modified)).map_err(of_io)?;
        let stat = self.disk.stat(&place).map_err(of_io)?.ok_or(Errno::ENOENT)?;
        self.table.set_inode(id, Some(stat.inode));
        let record = self.table.get_mut(id)?;
        record.in_upper = true;
        record.durable = false;
        Counters::add(&self.counters.materialized, 1);
        Ok(())
    }

    /// Puts the names of the lower that are gone on stable storage, for a change that has to come after.
    pub(super) fn sync_journal(&mut self) -> io::Result<()> {
        self.stable.sync(|| self.journal.sync())
    }

    /// Opens what has to be synced for a directory's names: itself, and where names are held back.
    pub(super) fn directories_of(&self, id: LocalId) -> Result<Vec<Box<dyn LocalDirectory>>, Errno> {
        let held = (!self.held.is_empty()).then(|| Path::new(DIRECTORY_NAME).join("held"));
        let own = if self.table.get(id)?.in_upper { Some(self.place_of(id)?) } else { None };
        let places = held.into_iter().chain(own);
        places.map(|place| self.disk.open_directory(&place).map_err(of_io)).collect()
    }

    fn temporary(&mut self) -> PathBuf {
        self.next_temporary += 1;
        Path::new(DIRECTORY_NAME).join("tmp").join(self.next_temporary.to_string())
    }
}

pub(super) fn held_place(name: &str) -> PathBuf {
    Path::new(DIRECTORY_NAME).join("held").join(name)
}

/// Shows what is not local as allocated: tools take a file without blocks for one hole and skip its content.
fn shown(found: Attributes, base_length: u64) -> Attributes {
    let links = if found.kind == FileKind::Directory { 1 } else { found.links };
    let blocks = if base_length > 0 { found.blocks.max(found.size.div_ceil(512)) } else { found.blocks };
    Attributes { links, blocks, ..found }
}

pub(super) fn of_io(error: io::Error) -> Errno {
    errno::of_io(&error)
}
