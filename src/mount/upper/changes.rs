//! Changes of names: create, remove, rename, link.
//!
//! Each keeps one order, so that a crash at any point leaves the state before or the state after: a name of the lower
//! is hidden on stable storage before the upper's own entry in its place goes away or moves, and what moves has its
//! place in the upper on stable storage before its old name is hidden. Where the upper has nothing under a name, hiding
//! it is the whole change, and becomes durable with the directory.

use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;

use crate::disk::Owner;
use crate::mount::fs::{FileKind, LocalId, NewNode, RenameMode};
use crate::mount::lower::Child;
use crate::mount::upper::as_owner::as_owner;
use crate::mount::upper::content::Content;
use crate::mount::upper::local_disk::LocalFile;
use crate::mount::upper::namespace::{Below, Namespace, of_io};
use crate::mount::upper::node::{Node, Record};

/// A name, with what the lower has there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Name<'a> {
    pub(crate) directory: LocalId,
    pub(crate) name: &'a [u8],
    pub(crate) below: &'a Below,
}

/// What there is to make under a new name.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Make<'a> {
    Directory,
    Node(NewNode),
    Symlink(&'a [u8]),
}

impl Namespace {
    /// Creates a file and leaves it open.
    pub(crate) fn create(&mut self, at: Name<'_>, mode: u32, owner: Owner) -> Result<LocalId, Errno> {
        let place = self.new_place(at)?;
        let file = as_owner(owner, || self.disk.create(&place, mode)).map_err(of_io)?;
        self.finish_new(at, &place, FileKind::File, owner, Some(file))
    }

    /// Makes anything that is not opened.
    pub(crate) fn make(
        &mut self,
        at: Name<'_>,
        what: Make<'_>,
        mode: u32,
        owner: Owner,
    ) -> Result<LocalId, Errno> {
        let place = self.new_place(at)?;
        let kind = match what {
            Make::Directory => {
                as_owner(owner, || self.disk.make_directory(&place, mode)).map_err(of_io)?;
                FileKind::Directory
            }
            Make::Symlink(target) => {
                as_owner(owner, || self.disk.make_symlink(target, &place)).map_err(of_io)?;
                FileKind::Symlink
            }
            Make::Node(node) => {
                as_owner(owner, || self.disk.make_node(&place, node, mode)).map_err(of_io)?;
                match node {
                    NewNode::File => FileKind::File,
                    NewNode::Fifo => FileKind::Fifo,
                    NewNode::Socket => FileKind::Socket,
                }
            }
        };
        self.finish_new(at, &place, kind, owner, None)
    }

    /// Checks that a name is free and gives its directory a place in the upper.
    fn new_place(&mut self, at: Name<'_>) -> Result<std::path::PathBuf, Errno> {
        if self.is_reserved(at.directory, at.name) {
            return Err(Errno::EPERM);
        }
        self.table.path(at.directory)?;
        let place = self.place(at.directory, at.name)?;
        let taken = self.table.at(at.directory, at.name).is_some()
            || self.is_visible_below(at)?
            || self.disk.stat(&place).map_err(of_io)?.is_some();
        if taken {
            return Err(Errno::EEXIST);
        }
        self.materialize_directory(at.directory)?;
        Ok(place)
    }

    fn finish_new(
        &mut self,
        at: Name<'_>,
        place: &Path,
        kind: FileKind,
        owner: Owner,
        file: Option<Arc<dyn LocalFile>>,
    ) -> Result<LocalId, Errno> {
        let given = self.disk.give(place, owner).and_then(|()| self.disk.stat(place)).map_err(of_io);
        let stat = match given {
            Ok(Some(stat)) => stat,
            outcome => {
                let _ = if kind == FileKind::Directory {
                    self.disk.remove_directory(place)
                } else {
                    self.disk.remove_file(place)
                };
                return Err(outcome.err().unwrap_or(Errno::ENOENT));
            }
        };
        let content = (kind == FileKind::File).then(|| Content::native(file));
        let node = Node { id: self.table.native_id(), kind, lower: None, content };
        let name = Some((at.directory, at.name.to_vec()));
        Ok(self.table.insert(node, name, true, Some(stat.inode)))
    }

    /// Removes a name that leads to anything but a directory.
    pub(crate) fn unlink(&mut self, at: Name<'_>) -> Result<(), Errno> {
        let id = self.table.at(at.directory, at.name).ok_or(Errno::ENOENT)?;
        if self.table.get(id)?.node.kind == FileKind::Directory {
            return Err(Errno::EISDIR);
        }
        self.keep_open(id)?;
        self.hide(at, self.table.get(id)?.in_upper)?;
        if self.table.get(id)?.in_upper {
            self.disk.remove_file(&self.place(at.directory, at.name)?).map_err(of_io)?;
        }
        self.take_name(at, id)
    }

    /// Removes an empty directory; `children` are what the lower has in it.
    pub(crate) fn remove_directory(&mut self, at: Name<'_>, children: &[Child]) -> Result<(), Errno> {
        let id = self.table.at(at.directory, at.name).ok_or(Errno::ENOENT)?;
        if self.table.get(id)?.node.kind != FileKind::Directory {
            return Err(Errno::ENOTDIR);
        }
        if !self.is_empty(id, children)? {
            return Err(Errno::ENOTEMPTY);
        }
        self.hide(at, self.table.get(id)?.in_upper)?;
        if self.table.get(id)?.in_upper {
            self.disk.remove_directory(&self.place(at.directory, at.name)?).map_err(of_io)?;
        }
        self.take_name(at, id)
    }

    /// Gives a file another name.
    pub(crate) fn link(&mut self, id: LocalId, to: Name<'_>, target: Option<&[u8]>) -> Result<(), Errno> {
        self.materialize(id, target)?;
        let from = self.place_of(id)?;
        let place = self.new_place(to)?;
        self.disk.link(&from, &place).map_err(of_io)?;
        self.note_move(id);
        self.table.add_name(id, to.directory, to.name.to_vec());
        self.table.get_mut(id)?.durable = false;
        self.close_unless_used(id)
    }

    /// Renames. `target` is where a symbolic link that moves points, `replaced` what the lower has in a directory that
    /// is replaced.
    pub(crate) fn rename(
        &mut self,
        from: Name<'_>,
        to: Name<'_>,
        mode: RenameMode,
        target: Option<&[u8]>,
        replaced: &[Child],
    ) -> Result<(), Errno> {
        let id = self.table.at(from.directory, from.name).ok_or(Errno::ENOENT)?;
        let old = self.table.at(to.directory, to.name);
        if self.is_reserved(to.directory, to.name) {
            return Err(Errno::EPERM);
        }
        if let Some(old) = old {
            if mode == RenameMode::NoReplace {
                return Err(Errno::EEXIST);
            }
            if old == id {
                return Ok(());
            }
            self.check_replaceable(id, old, replaced)?;
            self.keep_open(old)?;
        }
        self.check_not_below_itself(id, to.directory)?;
        self.materialize(id, target)?;
        self.materialize_directory(to.directory)?;
        if self.is_visible_below(from)? {
            // From here on the name leads nowhere but to the upper's entry, which must not be lost with a power cut.
            let node = self.table.get(id)?.node.clone();
            if let Some(file) = node.content.as_ref().and_then(Content::file) {
                self.stable.sync(|| file.sync(false)).map_err(of_io)?;
            }
            if node.kind == FileKind::Directory {
                self.disk.sync_directory(&self.place_of(id)?).map_err(of_io)?;
            }
            self.make_durable_now(id)?;
            self.hide(from, true)?;
        }
        let (source, place) = (self.place(from.directory, from.name)?, self.place(to.directory, to.name)?);
        self.disk.rename(&source, &place).map_err(of_io)?;
        self.note_move(id);
        if let Some(old) = old {
            self.take_name(to, old)?;
        }
        self.table.add_name(id, to.directory, to.name.to_vec());
        self.table.remove_name(from.directory, from.name);
        self.table.get_mut(id)?.durable = false;
        self.close_unless_used(id)?;
        self.table.collect(id);
        Ok(())
    }

    /// Counts what a walk through the tree may have missed at its old name and at its new one.
    fn note_move(&mut self, id: LocalId) {
        let matters =
            |record: &Record| record.node.lower.is_some() || record.node.kind == FileKind::Directory;
        self.moves += u64::from(self.table.get(id).is_ok_and(matters));
    }

    fn check_replaceable(&self, id: LocalId, old: LocalId, below: &[Child]) -> Result<(), Errno> {
        let is_directory = |id| Ok::<_, Errno>(self.table.get(id)?.node.kind == FileKind::Directory);
        match (is_directory(id)?, is_directory(old)?) {
            (true, false) => Err(Errno::ENOTDIR),
            (false, true) => Err(Errno::EISDIR),
            (true, true) if !self.is_empty(old, below)? => Err(Errno::ENOTEMPTY),
            _ => Ok(()),
        }
    }

    fn check_not_below_itself(&self, id: LocalId, directory: LocalId) -> Result<(), Errno> {
        let (moved, into) = (self.table.path(id)?, self.table.path(directory)?);
        if into.starts_with(&moved) { Err(Errno::EINVAL) } else { Ok(()) }
    }

    /// Gives a node of any kind a place in the upper; `target` is where a symbolic link points.
    pub(super) fn materialize(&mut self, id: LocalId, target: Option<&[u8]>) -> Result<(), Errno> {
        match self.table.get(id)?.node.kind {
            FileKind::File => self.materialize_file(id).map(drop),
            FileKind::Directory => self.materialize_directory(id),
            FileKind::Symlink => match target {
                Some(target) => self.materialize_symlink(id, target),
                None if self.table.get(id)?.in_upper => Ok(()),
                None => Err(Errno::EIO),
            },
            // Only the upper has these.
            FileKind::Fifo | FileKind::Socket => Ok(()),
        }
    }

    /// Hides the lower's name, and waits for stable storage where the upper's entry goes away next.
    pub(super) fn hide(&mut self, at: Name<'_>, upper_follows: bool) -> Result<(), Errno> {
        if let (Some((_, path)), true) = (self.lower_path(at.directory, at.name)?, at.below.is_some()) {
            self.journal.hide(&path).map_err(of_io)?;
        }
        // Also for a name hidden earlier: its line may not be down yet.
        if upper_follows && at.below.is_some() { self.sync_journal().map_err(of_io) } else { Ok(()) }
    }

    fn is_visible_below(&self, at: Name<'_>) -> Result<bool, Errno> {
        Ok(at.below.is_some() && self.lower_path(at.directory, at.name)?.is_some())
    }

    /// Opens a file that is about to lose its place, if somebody still uses it.
    fn keep_open(&mut self, id: LocalId) -> Result<(), Errno> {
        let record = self.table.get(id)?;
        if record.in_upper && record.handles > 0 && record.node.content.is_some() {
            self.open_in_upper(id)?;
        }
        Ok(())
    }

    /// Closes a file that was opened only to be moved.
    fn close_unless_used(&mut self, id: LocalId) -> Result<(), Errno> {
        let record = self.table.get(id)?;
        if record.handles == 0
            && let Some(content) = &record.node.content
        {
            content.detach();
        }
        Ok(())
    }

    /// Takes a removed name from its record.
    fn take_name(&mut self, at: Name<'_>, id: LocalId) -> Result<(), Errno> {
        self.table.remove_name(at.directory, at.name);
        if self.table.get(id).is_ok_and(|record| record.names.is_empty()) {
            self.table.set_inode(id, None);
        }
        self.table.collect(id);
        Ok(())
    }
}
