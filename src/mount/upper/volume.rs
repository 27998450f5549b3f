//! The upper as a volume: asks the lower first, then changes or reads under the lock.
//!
//! Every operation has two parts. Waiting (for the lower, for content) comes first, holds no lock and may be given up
//! when the caller is killed; then one synchronous step on the namespace or the content, which always runs to its
//! end. Steps that sync run on a blocking thread, so that one slow disk does not stop the dispatcher.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use nix::errno::Errno;

use crate::mount::caller::Caller;
use crate::mount::errno;
use crate::mount::fs::{
    Capacity, Entry, FileKind, IoMode, Lifetime, ListEntry, LocalId, NewNode, OpenFile, Opened, RenameMode,
    Seek, SetAttributes, Volume,
};
use crate::mount::lower::{Child, LowerError};
use crate::mount::upper::changes::{Make, Name};
use crate::mount::upper::content::Content;
use crate::mount::upper::found::Found;
use crate::mount::upper::local_disk::Times;
use crate::mount::upper::namespace::{Below, Entered, Namespace, of_io};
use crate::mount::upper::node::{LowerNode, Node};
use crate::mount::upper::read_ahead::TasksAhead;
use crate::mount::upper::stats::Counters;
use crate::mount::upper::{Shared, Upper};

/// The longest name Linux has.
const NAME_BYTES_MAX: usize = 255;

/// An open file of an upper.
#[derive(Debug)]
pub struct UpperFile {
    pub(super) shared: Arc<Shared>,
    pub(super) node: Arc<Node>,
    /// What is being fetched because it follows what was read here; ends with the file.
    pub(super) ahead: TasksAhead,
}

impl Upper {
    /// Opens a file by its number; see [`UpperFile::ensure_range`].
    pub fn open_file(&self, id: LocalId) -> Result<Arc<UpperFile>, Errno> {
        let mut namespace = self.shared.lock();
        let record = namespace.table.get_mut(id)?;
        match record.node.kind {
            FileKind::File => {}
            FileKind::Directory => return Err(Errno::EISDIR),
            FileKind::Symlink => return Err(Errno::ELOOP),
            // The kernel opens these by itself.
            FileKind::Fifo | FileKind::Socket => return Err(Errno::ENXIO),
        }
        record.handles += 1;
        let (shared, node) = (self.shared.clone(), record.node.clone());
        Ok(Arc::new(UpperFile { shared, node, ahead: TasksAhead::default() }))
    }

    /// Finds a name and enters it into the table, where it stays as long as what is returned.
    async fn find(
        &self,
        caller: &Caller,
        directory: LocalId,
        name: &[u8],
    ) -> Result<(Option<Found>, Below), Errno> {
        if name.len() > NAME_BYTES_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        if self.shared.lock().is_reserved(directory, name) {
            return Ok((None, None));
        }
        let below = self.below(caller, directory, name).await?;
        let mut moved: Option<LowerNode> = None;
        loop {
            let entered = {
                let mut namespace = self.shared.lock();
                let entered = namespace.enter(directory, name, &below, moved.as_ref())?;
                if let Entered::Known(id) = entered {
                    namespace.table.get_mut(id)?.references += 1;
                }
                entered
            };
            match entered {
                Entered::Known(id) => return Ok((Some(Found::counted(self, id)), below)),
                Entered::Absent => return Ok((None, below)),
                Entered::NeedsOrigin(path) => {
                    let found = caller.killable(self.resolve(&path)).await?;
                    // An origin that the lower does not have: this upper is not its own.
                    moved = Some(found.ok_or(Errno::EIO)?);
                }
            }
        }
    }

    /// Asks what the lower has under a name that nothing hides.
    async fn below(&self, caller: &Caller, directory: LocalId, name: &[u8]) -> Result<Below, Errno> {
        let Some((node, _)) = self.shared.lock().lower_path(directory, name)? else { return Ok(None) };
        let lower = &self.shared.lower;
        caller.killable(async { of_lower(lower.lookup(node, name).await) }).await
    }

    /// Follows a path in the lower.
    async fn resolve(&self, path: &[u8]) -> Result<Option<LowerNode>, Errno> {
        let lower = &self.shared.lower;
        let root = lower.root();
        let mut at = (root, of_lower(lower.node(root).await)?);
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            match of_lower(lower.lookup(at.0, name).await)? {
                Some(found) => at = found,
                None => return Ok(None),
            }
        }
        Ok(Some(LowerNode { id: at.0, path: path.to_vec(), node: at.1 }))
    }

    /// Asks what the lower has in a directory; anything else has nothing in it.
    async fn children(&self, caller: &Caller, id: LocalId) -> Result<Vec<Child>, Errno> {
        let node = {
            let namespace = self.shared.lock();
            if namespace.is_alone {
                return Ok(Vec::new());
            }
            namespace.table.get(id)?.node.clone()
        };
        let Some(lower) = node.lower.as_ref().filter(|_| node.kind == FileKind::Directory) else {
            return Ok(Vec::new());
        };
        caller.killable(async { of_lower(self.shared.lower.list(lower.id).await) }).await
    }

    /// Asks where a symbolic link points that only the lower has.
    async fn link_target(&self, caller: &Caller, id: LocalId) -> Result<Option<Vec<u8>>, Errno> {
        let (node, in_upper) = {
            let namespace = self.shared.lock();
            let record = namespace.table.get(id)?;
            (record.node.clone(), record.in_upper)
        };
        match &node.lower {
            Some(lower) if node.kind == FileKind::Symlink && !in_upper => {
                let target =
                    caller.killable(async { of_lower(self.shared.lower.read_link(lower.id).await) }).await?;
                Ok(Some(target))
            }
            _ => Ok(None),
        }
    }

    /// Runs a step that may sync on a blocking thread.
    async fn step<T: Send + 'static>(
        &self,
        step: impl FnOnce(&mut Namespace) -> Result<T, Errno> + Send + 'static,
    ) -> Result<T, Errno> {
        let shared = self.shared.clone();
        blocking(move || step(&mut shared.lock())).await
    }

    /// Answers with what `stat` shows, counting a reference of the kernel's.
    fn answer(&self, namespace: &mut Namespace, id: LocalId) -> Result<Entry, Errno> {
        let attributes = namespace.attributes(id)?;
        namespace.table.get_mut(id)?.references += 1;
        Ok(Entry { id, attributes, lifetime: Lifetime::Forever })
    }

    async fn make(
        &self,
        caller: &Caller,
        directory: LocalId,
        name: &[u8],
        what: Make<'_>,
        mode: u32,
    ) -> Result<Entry, Errno> {
        let (found, below) = self.find(caller, directory, name).await?;
        if found.is_some() {
            return Err(Errno::EEXIST);
        }
        let mut namespace = self.shared.lock();
        let id = namespace.make(Name { directory, name, below: &below }, what, mode, caller.owner)?;
        self.answer(&mut namespace, id)
    }
}

#[async_trait::async_trait]
impl Volume for Upper {
    fn root(&self) -> LocalId {
        self.shared.lock().table.root()
    }

    async fn lookup(&self, caller: &Caller, directory: LocalId, name: &[u8]) -> Result<Entry, Errno> {
        {
            let mut namespace = self.shared.lock();
            if let Some(id) = namespace.table.at(directory, name) {
                return self.answer(&mut namespace, id);
            }
        }
        let (found, _) = self.find(caller, directory, name).await?;
        let found = found.ok_or(Errno::ENOENT)?;
        self.answer(&mut self.shared.lock(), found.id())
    }

    fn forget(&self, node: LocalId, references: u64) {
        self.shared.lock().table.forget(node, references);
    }

    async fn attributes(&self, _: &Caller, node: LocalId) -> Result<Entry, Errno> {
        let attributes = self.shared.lock().attributes(node)?;
        Ok(Entry { id: node, attributes, lifetime: Lifetime::Forever })
    }

    async fn read_link(&self, caller: &Caller, node: LocalId) -> Result<Vec<u8>, Errno> {
        if let Some(target) = self.link_target(caller, node).await? {
            return Ok(target);
        }
        let namespace = self.shared.lock();
        let place = namespace.place_of(node)?;
        namespace.disk.read_link(&place).map_err(of_io)
    }

    async fn list(&self, caller: &Caller, directory: LocalId) -> Result<Vec<ListEntry>, Errno> {
        let children = self.children(caller, directory).await?;
        self.shared.lock().list(directory, &children)
    }

    async fn open(&self, _: &Caller, node: LocalId, writable: bool) -> Result<Opened, Errno> {
        let file = self.open_file(node)?;
        let mode = file.io_mode(writable)?;
        Ok(Opened { file, mode })
    }

    fn capacity(&self) -> Result<Capacity, Errno> {
        self.shared.disk.capacity().map_err(of_io)
    }

    async fn set_attributes(&self, caller: &Caller, id: LocalId, set: SetAttributes) -> Result<Entry, Errno> {
        let target = self.link_target(caller, id).await?;
        let upper = self.clone();
        let change = move || {
            let kind = upper.shared.lock().table.get(id)?.node.kind;
            match kind {
                FileKind::File => upper.open_file(id)?.set_attributes(set)?,
                _ => upper.shared.lock().set_attributes(id, target.as_deref(), set)?,
            }
            upper.shared.lock().attributes(id)
        };
        // Only cutting a file syncs.
        let attributes = if set.size.is_some() { blocking(change).await? } else { change()? };
        Ok(Entry { id, attributes, lifetime: Lifetime::Forever })
    }

    async fn create(
        &self,
        caller: &Caller,
        directory: LocalId,
        name: &[u8],
        mode: u32,
        exclusive: bool,
    ) -> Result<(Entry, Opened), Errno> {
        let (found, below) = self.find(caller, directory, name).await?;
        let (entry, id) = {
            let mut namespace = self.shared.lock();
            let id = match &found {
                Some(_) if exclusive => return Err(Errno::EEXIST),
                Some(found) => found.id(),
                None => namespace.create(Name { directory, name, below: &below }, mode, caller.owner)?,
            };
            (self.answer(&mut namespace, id)?, id)
        };
        let opened = self.open(caller, id, true).await.inspect_err(|_| self.forget(id, 1))?;
        Ok((entry, opened))
    }

    async fn make_node(
        &self,
        caller: &Caller,
        directory: LocalId,
        name: &[u8],
        what: NewNode,
        mode: u32,
    ) -> Result<Entry, Errno> {
        self.make(caller, directory, name, Make::Node(what), mode).await
    }

    async fn make_directory(
        &self,
        caller: &Caller,
        parent: LocalId,
        name: &[u8],
        mode: u32,
    ) -> Result<Entry, Errno> {
        self.make(caller, parent, name, Make::Directory, mode).await
    }

    async fn make_symlink(
        &self,
        caller: &Caller,
        directory: LocalId,
        name: &[u8],
        to: &[u8],
    ) -> Result<Entry, Errno> {
        self.make(caller, directory, name, Make::Symlink(to), 0o777).await
    }

    async fn link(
        &self,
        caller: &Caller,
        id: LocalId,
        directory: LocalId,
        name: &[u8],
    ) -> Result<Entry, Errno> {
        let (found, below) = self.find(caller, directory, name).await?;
        if found.is_some() {
            return Err(Errno::EEXIST);
        }
        let target = self.link_target(caller, id).await?;
        let mut namespace = self.shared.lock();
        namespace.link(id, Name { directory, name, below: &below }, target.as_deref())?;
        self.answer(&mut namespace, id)
    }

    async fn unlink(&self, caller: &Caller, directory: LocalId, name: &[u8]) -> Result<(), Errno> {
        let (found, below) = self.find(caller, directory, name).await?;
        let _found = found.ok_or(Errno::ENOENT)?;
        let (shared, name) = (self.shared.clone(), name.to_vec());
        blocking(move || {
            let at = Name { directory, name: &name, below: &below };
            shared.hide_ahead(at)?;
            shared.lock().unlink(at)
        })
        .await
    }

    async fn remove_directory(&self, caller: &Caller, directory: LocalId, name: &[u8]) -> Result<(), Errno> {
        let (found, below) = self.find(caller, directory, name).await?;
        let found = found.ok_or(Errno::ENOENT)?;
        let children = self.children(caller, found.id()).await?;
        let name = name.to_vec();
        self.step(move |namespace| {
            namespace.remove_directory(Name { directory, name: &name, below: &below }, &children)
        })
        .await
    }

    async fn rename(
        &self,
        caller: &Caller,
        from: (LocalId, &[u8]),
        to: (LocalId, &[u8]),
        mode: RenameMode,
    ) -> Result<(), Errno> {
        let (moved, below_from) = self.find(caller, from.0, from.1).await?;
        let (replaced, below_to) = self.find(caller, to.0, to.1).await?;
        let moved = moved.ok_or(Errno::ENOENT)?;
        let target = self.link_target(caller, moved.id()).await?;
        let children = match &replaced {
            Some(replaced) => self.children(caller, replaced.id()).await?,
            None => Vec::new(),
        };
        let (from, to) = ((from.0, from.1.to_vec()), (to.0, to.1.to_vec()));
        self.step(move |namespace| {
            let from = Name { directory: from.0, name: &from.1, below: &below_from };
            let to = Name { directory: to.0, name: &to.1, below: &below_to };
            namespace.rename(from, to, mode, target.as_deref(), &children)
        })
        .await
    }

    async fn sync_directory(&self, directory: LocalId) -> Result<(), Errno> {
        let shared = self.shared.clone();
        blocking(move || shared.sync_directory(directory)).await
    }
}

impl Namespace {
    /// Changes the attributes of anything but a file.
    fn set_attributes(
        &mut self,
        id: LocalId,
        target: Option<&[u8]>,
        set: SetAttributes,
    ) -> Result<(), Errno> {
        self.materialize(id, target)?;
        let place = self.place_of(id)?;
        if set.size.is_some() {
            return Err(Errno::EISDIR);
        }
        if set.uid.is_some() || set.gid.is_some() {
            self.disk.set_owner(&place, set.uid, set.gid).map_err(of_io)?;
        }
        if let Some(mode) = set.mode {
            self.disk.set_mode(&place, mode).map_err(of_io)?;
        }
        self.disk.set_times(&place, Times { atime: set.atime, mtime: set.mtime }).map_err(of_io)
    }
}

impl UpperFile {
    fn content(&self) -> Result<&Content, Errno> {
        self.node.content.as_ref().ok_or(Errno::EISDIR)
    }

    /// Decides how the kernel may use the file from this open on: without us once nothing of it has to be fetched.
    ///
    /// What is whole stays so while it is open: what is local is never given back, and the base length only falls.
    fn io_mode(&self, writable: bool) -> Result<IoMode, Errno> {
        self.check_not_lost()?;
        // What an earlier process fetched is known only once the upper's file has been looked at.
        self.open_if_local()?;
        let content = self.content()?;
        if !content.is_whole() {
            return Ok(IoMode::Direct);
        }
        // An empty file of the lower has no place in the upper yet; whoever only reads it needs none.
        if content.file().is_none() {
            if !writable {
                return Ok(IoMode::Direct);
            }
            match self.materialize() {
                Err(Errno::ENOSPC | Errno::EDQUOT) => return Ok(IoMode::Direct),
                outcome => outcome?,
            }
        }
        Ok(IoMode::Passthrough)
    }

    /// Opens what the upper has of the file, and leaves it at that where it has nothing.
    pub(super) fn open_if_local(&self) -> Result<(), Errno> {
        if self.content()?.file().is_none() {
            let mut namespace = self.shared.lock();
            if namespace.table.get(self.node.id)?.in_upper {
                namespace.open_in_upper(self.node.id)?;
            }
        }
        Ok(())
    }

    fn materialize(&self) -> Result<(), Errno> {
        match self.content()?.file() {
            Some(_) => Ok(()),
            None => self.shared.lock().materialize_file(self.node.id).map(drop),
        }
    }

    /// Changes the file's attributes, through the open file: it may have no name any more.
    fn set_attributes(&self, set: SetAttributes) -> Result<(), Errno> {
        let file = self.shared.lock().materialize_file(self.node.id)?;
        if let Some(length) = set.size {
            self.content()?.set_length(length, &self.shared.stable).map_err(of_io)?;
        }
        if set.uid.is_some() || set.gid.is_some() {
            file.set_owner(set.uid, set.gid).map_err(of_io)?;
        }
        // After the owner, whose change may clear bits of the mode.
        if let Some(mode) = set.mode {
            file.set_mode(mode).map_err(of_io)?;
        }
        file.set_times(Times { atime: set.atime, mtime: set.mtime }).map_err(of_io)
    }
}

#[async_trait::async_trait]
impl OpenFile for UpperFile {
    async fn read(&self, caller: &Caller, offset: u64, length: u32) -> Result<Bytes, Errno> {
        self.check_not_lost()?;
        Counters::add(&self.shared.counters.reads, 1);
        let range = offset..offset.saturating_add(u64::from(length));
        // First, so that what follows is under way while this is waited for.
        self.read_ahead(&range);
        match self.ensure_to_read(caller, range).await {
            Ok(()) => {
                self.open_if_local()?;
                self.content()?.read(offset, length).map_err(of_io)
            }
            Err(Errno::ENOSPC | Errno::EDQUOT) => {
                self.stop_reading_ahead();
                self.read_through(caller, offset, length).await
            }
            Err(errno) => Err(errno),
        }
    }

    async fn write(&self, caller: &Caller, offset: u64, data: Bytes) -> Result<(), Errno> {
        self.materialize()?;
        self.write_around(caller, offset, &data).await
    }

    async fn sync(&self, data_only: bool) -> Result<(), Errno> {
        let (shared, node) = (self.shared.clone(), self.node.clone());
        blocking(move || shared.sync_file(&node, data_only)).await
    }

    async fn sync_name(&self) -> Result<(), Errno> {
        let (shared, id) = (self.shared.clone(), self.node.id);
        blocking(move || shared.make_durable(id)).await
    }

    async fn allocate(&self, offset: u64, length: u64, keep_size: bool) -> Result<(), Errno> {
        let (shared, node) = (self.shared.clone(), self.node.clone());
        // Reserving a gigabyte takes a while.
        blocking(move || {
            shared.lock().materialize_file(node.id)?;
            let content = node.content.as_ref().ok_or(Errno::EISDIR)?;
            content.allocate(offset, length, keep_size).map_err(of_io)
        })
        .await
    }

    async fn seek(&self, offset: u64, what: Seek) -> Result<u64, Errno> {
        self.materialize()?;
        self.content()?.seek(offset, what).map_err(of_io)
    }

    fn backing(&self) -> Result<OwnedFd, Errno> {
        let file = self.content()?.file().ok_or(Errno::EBADF)?;
        file.descriptor().map_err(of_io)
    }

    fn will_need(&self, offset: u64, length: u32) {
        if let Some(file) = self.node.content.as_ref().and_then(Content::file) {
            Counters::add(&self.shared.counters.hints, 1);
            // Only a hint: who reads without it learns of any error.
            let _ = file.read_ahead(offset, u64::from(length));
        }
    }
}

impl Drop for UpperFile {
    fn drop(&mut self) {
        let mut namespace = self.shared.lock();
        let id = self.node.id;
        if let Ok(record) = namespace.table.get_mut(id) {
            record.handles = record.handles.saturating_sub(1);
            if record.handles == 0
                && let Some(content) = &record.node.content
            {
                content.detach();
            }
        }
        namespace.table.collect(id);
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Errno> + Send + 'static,
) -> Result<T, Errno> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(Errno::EIO))
}

fn of_lower<T>(outcome: Result<T, LowerError>) -> Result<T, Errno> {
    outcome.map_err(|error| errno::of_lower(&error))
}
