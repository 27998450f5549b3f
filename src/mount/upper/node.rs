//! What the upper remembers about the nodes the kernel knows: identity, names, and who still uses them.
//!
//! A node of the lower keeps the number it has there plus one, wherever it is moved; one made here gets a number of
//! its own. A record stays while the kernel holds references, a handle is open or a child has a record. A name leads
//! to at most one record, and a record knows all its names, so that paths can be built from the root down at any time.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;

use crate::mount::fs::{FileKind, LocalId};
use crate::mount::lower::{self, NodeId};
use crate::mount::upper::content::Content;

/// The first number of nodes made here.
const FIRST_NATIVE: u64 = NodeId::MAX.0 + 2;

/// A node of the lower, with the path it has there.
#[derive(Debug, Clone)]
pub(crate) struct LowerNode {
    pub(crate) id: NodeId,
    pub(crate) path: Vec<u8>,
    pub(crate) node: lower::Node,
}

/// What never changes about a node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: LocalId,
    pub(crate) kind: FileKind,
    pub(crate) lower: Option<LowerNode>,
    /// The content of a file, and of nothing else.
    pub(crate) content: Option<Content>,
}

/// What changes about a node.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) node: Arc<Node>,
    /// Directory and name; none once removed, several for hard links.
    pub(crate) names: Vec<(LocalId, Vec<u8>)>,
    pub(crate) in_upper: bool,
    /// Whether its name in the upper is known to be on stable storage, with all directories above.
    pub(crate) durable: bool,
    /// How often a name was given to it or taken from it.
    pub(crate) changes: u64,
    pub(crate) references: u64,
    pub(crate) handles: u32,
    children: u32,
    inode: Option<u64>,
}

/// The records of all nodes the kernel knows.
#[derive(Debug)]
pub(crate) struct Table {
    root: LocalId,
    records: HashMap<LocalId, Record>,
    places: HashMap<(LocalId, Vec<u8>), LocalId>,
    /// Which record has this inode of the local file system, to recognise hard links.
    inodes: HashMap<u64, LocalId>,
    next_native: u64,
}

impl Table {
    /// Creates a table that holds the root.
    pub(crate) fn new(root: Node) -> Self {
        let id = root.id;
        let mut table = Self {
            root: id,
            records: HashMap::new(),
            places: HashMap::new(),
            inodes: HashMap::new(),
            next_native: FIRST_NATIVE,
        };
        table.insert(root, None, true, None);
        table.get_mut(id).expect("just inserted").references = 1;
        table
    }

    /// Returns the top directory.
    pub(crate) fn root(&self) -> LocalId {
        self.root
    }

    /// Returns the number of a lower's node.
    pub(crate) fn id_of(node: NodeId) -> Result<LocalId, Errno> {
        if node <= NodeId::MAX { Ok(LocalId(node.0 + 1)) } else { Err(Errno::EIO) }
    }

    /// Returns a number nobody has had.
    pub(crate) fn native_id(&mut self) -> LocalId {
        self.next_native += 1;
        LocalId(self.next_native - 1)
    }

    pub(crate) fn get(&self, id: LocalId) -> Result<&Record, Errno> {
        self.records.get(&id).ok_or(Errno::ESTALE)
    }

    pub(crate) fn get_mut(&mut self, id: LocalId) -> Result<&mut Record, Errno> {
        self.records.get_mut(&id).ok_or(Errno::ESTALE)
    }

    /// Returns the record that a name leads to, if it is known.
    pub(crate) fn at(&self, directory: LocalId, name: &[u8]) -> Option<LocalId> {
        self.places.get(&(directory, name.to_vec())).copied()
    }

    /// Returns the record with an inode of the local file system.
    pub(crate) fn with_inode(&self, inode: u64) -> Option<LocalId> {
        self.inodes.get(&inode).copied()
    }

    /// Adds a node; `inode` is its inode in the upper, if it is there.
    pub(crate) fn insert(
        &mut self,
        node: Node,
        name: Option<(LocalId, Vec<u8>)>,
        in_upper: bool,
        inode: Option<u64>,
    ) -> LocalId {
        let id = node.id;
        let record = Record {
            node: Arc::new(node),
            names: Vec::new(),
            in_upper,
            // Whatever was found was there when the file system was last synced, or is made durable by its fsync.
            durable: false,
            changes: 0,
            references: 0,
            handles: 0,
            children: 0,
            inode: None,
        };
        self.records.insert(id, record);
        if let Some((directory, name)) = name {
            self.add_name(id, directory, name);
        }
        self.set_inode(id, inode);
        id
    }

    /// Gives a record a name.
    pub(crate) fn add_name(&mut self, id: LocalId, directory: LocalId, name: Vec<u8>) {
        if let Some(record) = self.records.get_mut(&id) {
            record.names.push((directory, name.clone()));
            record.changes += 1;
        }
        if let Some(parent) = self.records.get_mut(&directory) {
            parent.children += 1;
        }
        self.places.insert((directory, name), id);
    }

    /// Takes a name from the record that has it.
    pub(crate) fn remove_name(&mut self, directory: LocalId, name: &[u8]) {
        let Some(id) = self.places.remove(&(directory, name.to_vec())) else { return };
        if let Some(record) = self.records.get_mut(&id) {
            record.names.retain(|(parent, own)| (*parent, own.as_slice()) != (directory, name));
            record.changes += 1;
        }
        if let Some(parent) = self.records.get_mut(&directory) {
            parent.children -= 1;
        }
        self.collect(directory);
    }

    /// Remembers, or with `None` forgets, which inode of the local file system a record has.
    pub(crate) fn set_inode(&mut self, id: LocalId, inode: Option<u64>) {
        let Some(record) = self.records.get_mut(&id) else { return };
        if let Some(old) = std::mem::replace(&mut record.inode, inode) {
            self.inodes.remove(&old);
        }
        if let Some(inode) = inode {
            self.inodes.insert(inode, id);
        }
    }

    /// Takes back references of the kernel's.
    pub(crate) fn forget(&mut self, id: LocalId, references: u64) {
        if let Some(record) = self.records.get_mut(&id) {
            record.references = record.references.saturating_sub(references);
            self.collect(id);
        }
    }

    /// Removes a record that nobody uses, and then those above that were kept for it.
    pub(crate) fn collect(&mut self, id: LocalId) {
        let mut unused = vec![id];
        while let Some(id) = unused.pop() {
            let Some(record) = self.records.get(&id) else { continue };
            if id == self.root || record.references > 0 || record.handles > 0 || record.children > 0 {
                continue;
            }
            let Some(record) = self.records.remove(&id) else { continue };
            if let Some(inode) = record.inode {
                self.inodes.remove(&inode);
            }
            for (directory, name) in record.names {
                self.places.remove(&(directory, name));
                if let Some(parent) = self.records.get_mut(&directory) {
                    parent.children -= 1;
                    unused.push(directory);
                }
            }
        }
    }

    /// Returns the path of a node in the merged tree, relative to the root; `ENOENT` once it has none.
    pub(crate) fn path(&self, id: LocalId) -> Result<PathBuf, Errno> {
        let mut names = Vec::new();
        let mut at = id;
        while at != self.root {
            let (directory, name) = self.get(at)?.names.first().ok_or(Errno::ENOENT)?;
            names.push(OsStr::from_bytes(name));
            at = *directory;
        }
        Ok(names.iter().rev().collect())
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }
}
