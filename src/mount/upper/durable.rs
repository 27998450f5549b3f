//! Puts files, names and directories on stable storage, with nothing locked while the disk works.
//!
//! Every request of the mount needs the lock of the names, and the dispatcher itself takes it: behind a sync that holds it
//! everything would stand still. So directories are opened under the lock and synced without it, and what has moved in
//! the meantime is done again. Only a rename that needs a sync between its steps keeps the lock (`changes`).

use std::io;
use std::path::Path;

use nix::errno::Errno;

use crate::mount::fs::{FileKind, LocalId};
use crate::mount::upper::Shared;
use crate::mount::upper::changes::Name;
use crate::mount::upper::local_disk::LocalDirectory;
use crate::mount::upper::namespace::{Namespace, of_io};
use crate::mount::upper::node::Node;

/// Names that are not known to be on stable storage, from a node's own up to the highest.
#[derive(Debug, Default)]
pub(super) struct Unsettled {
    /// Each with how often its names have changed.
    nodes: Vec<(LocalId, u64)>,
    /// Where they are.
    directories: Vec<Box<dyn LocalDirectory>>,
}

impl Unsettled {
    fn sync(&self) -> io::Result<()> {
        self.directories.iter().try_for_each(|directory| directory.sync())
    }
}

impl Shared {
    /// Puts a file on stable storage, and its place in the upper: who had it in the lower never had to create it, and
    /// will not sync its directory.
    ///
    /// Once a sync has failed, of whatever file and whoever asked for it, none succeeds: the kernel tells of a lost write
    /// whoever syncs first, and that need not have been the one who has to hear it.
    pub(super) fn sync_file(&self, node: &Node, data_only: bool) -> Result<(), Errno> {
        let content = node.content.as_ref().ok_or(Errno::EISDIR)?;
        self.stable.check().map_err(of_io)?;
        let file = {
            let mut namespace = self.lock();
            match content.file() {
                Some(file) => file,
                // Nothing was ever written to it.
                None if !namespace.table.get(node.id)?.in_upper => return Ok(()),
                None => namespace.open_in_upper(node.id)?,
            }
        };
        self.stable.sync(|| file.sync(data_only)).map_err(of_io)?;
        self.make_durable(node.id)
    }

    /// Makes sure that a node is still found in the upper after a power cut.
    pub(super) fn make_durable(&self, id: LocalId) -> Result<(), Errno> {
        loop {
            let unsettled = self.lock().unsettled(id)?;
            unsettled.sync().map_err(of_io)?;
            if self.lock().settle(&unsettled) {
                return Ok(());
            }
        }
    }

    /// Puts a directory's names on stable storage: those of the upper, and those of the lower that are gone.
    pub(super) fn sync_directory(&self, id: LocalId) -> Result<(), Errno> {
        self.sync_journal().map_err(of_io)?;
        let directories = self.lock().directories_of(id)?;
        directories.iter().try_for_each(|directory| directory.sync()).map_err(of_io)?;
        self.make_durable(id)
    }

    /// Hides a name of the lower whose file in the upper is about to be removed, so that the removal need not wait for
    /// that with the lock held. Until then, and for good if it comes to nothing, the file is one that came from elsewhere.
    pub(super) fn hide_ahead(&self, at: Name<'_>) -> Result<(), Errno> {
        {
            let mut namespace = self.lock();
            let Some(id) = namespace.table.at(at.directory, at.name) else { return Ok(()) };
            let record = namespace.table.get(id)?;
            if !record.in_upper || record.node.kind == FileKind::Directory {
                return Ok(());
            }
            namespace.hide(at, false)?;
        }
        self.sync_journal().map_err(of_io)
    }

    /// Puts the names of the lower that are gone so far on stable storage.
    pub(super) fn sync_journal(&self) -> io::Result<()> {
        let Some(unsynced) = self.lock().journal.unsynced()? else { return Ok(()) };
        let synced = self.stable.sync(|| unsynced.file.sync(true));
        self.lock().journal.note_sync(&unsynced, &synced);
        synced
    }
}

impl Namespace {
    /// Makes sure that a node is still found in the upper after a power cut, for a change that has to come after.
    pub(super) fn make_durable_now(&mut self, id: LocalId) -> Result<(), Errno> {
        let unsettled = self.unsettled(id)?;
        unsettled.sync().map_err(of_io)?;
        self.settle(&unsettled);
        Ok(())
    }

    fn unsettled(&self, id: LocalId) -> Result<Unsettled, Errno> {
        let mut unsettled = Unsettled::default();
        let mut at = id;
        loop {
            let record = self.table.get(at)?;
            let Some((above, _)) = record.names.first().filter(|_| record.in_upper && !record.durable) else {
                return Ok(unsettled);
            };
            let place = self.place_of(at)?;
            let directory = self.disk.open_directory(place.parent().unwrap_or(Path::new("")));
            unsettled.directories.push(directory.map_err(of_io)?);
            unsettled.nodes.push((at, record.changes));
            at = *above;
        }
    }

    /// Takes note that names are on stable storage, unless one has changed since it was looked at; then of none.
    fn settle(&mut self, unsettled: &Unsettled) -> bool {
        let mut nodes = unsettled.nodes.iter();
        let is_still =
            nodes.all(|(id, changes)| self.table.get(*id).is_ok_and(|found| found.changes == *changes));
        for (id, _) in unsettled.nodes.iter().filter(|_| is_still) {
            if let Ok(record) = self.table.get_mut(*id) {
                record.durable = true;
            }
        }
        is_still
    }
}

#[cfg(test)]
mod tests {
    use crate::mount::fs::RenameMode;
    use crate::mount::upper::tests::simulated_disk::SimulatedDisk;
    use crate::mount::upper::tests::world::World;

    #[tokio::test]
    async fn a_name_that_was_elsewhere_while_its_directory_was_synced_is_not_taken_for_stable() {
        let disk = SimulatedDisk::new(u64::MAX);
        let world = World::on(&disk).await;
        world.make_directory("other").await.unwrap();
        drop(world.create("base/new").await.unwrap());
        let (id, base) = (world.find("base/new").await.unwrap().id, world.find("base").await.unwrap().id);
        let shared = &world.upper.shared;
        let durable = |id| shared.lock().table.get(id).unwrap().durable;
        let unsettled = shared.lock().unsettled(id).unwrap();
        assert_eq!(unsettled.nodes.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [id, base]);
        for (from, to) in [("base/new", "other/new"), ("other/new", "base/new")] {
            world.rename(from, to, RenameMode::Replace).await.unwrap();
        }
        unsettled.sync().unwrap();
        assert!(!shared.lock().settle(&unsettled));
        assert_eq!((durable(id), durable(base)), (false, false));
        shared.make_durable(id).unwrap();
        assert_eq!((durable(id), durable(base)), (true, true));
        assert!(shared.lock().unsettled(id).unwrap().nodes.is_empty());
    }
}
