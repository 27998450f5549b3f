//! A file system in memory, as simple as can be: what the upper must behave like.
//!
//! Paths lead to entries, hard links share their content, errors are those of Linux.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use nix::errno::Errno;

use crate::mount::memory_lower::MemoryLower;
use crate::mount::upper::tests::world::TREE;

/// What is at a path.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Shape {
    Directory,
    File(Vec<u8>),
    Symlink(Vec<u8>),
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory => f.write_str("directory"),
            Self::Symlink(target) => write!(f, "link to {}", String::from_utf8_lossy(target)),
            Self::File(content) => write!(f, "{} bytes", content.len()),
        }
    }
}

pub(crate) type Bytes = Rc<RefCell<Vec<u8>>>;

#[derive(Debug, Clone)]
enum Entry {
    Directory,
    File(Bytes),
    /// Shared by its names, like a file's content.
    Symlink(Rc<Vec<u8>>),
}

/// The reference.
#[derive(Debug)]
pub(crate) struct Model {
    entries: BTreeMap<String, Entry>,
}

impl Model {
    /// Creates a model that holds what the lower does.
    pub(crate) fn new(lower: &MemoryLower) -> Self {
        let mut model = Self { entries: BTreeMap::new() };
        for (path, size) in TREE {
            let (path, target) = path.split_once(" -> ").unwrap_or((path, ""));
            for (at, _) in path.match_indices('/') {
                model.entries.insert(path[..at].to_owned(), Entry::Directory);
            }
            let entry = match (path.strip_suffix('/'), target) {
                (Some(_), _) => continue,
                (None, "") => Entry::File(Rc::new(RefCell::new(lower.content(lower.at(path), 0..size)))),
                (None, target) => Entry::Symlink(Rc::new(target.as_bytes().to_vec())),
            };
            model.entries.insert(path.to_owned(), entry);
        }
        model
    }

    pub(crate) fn shape(&self) -> BTreeMap<String, Shape> {
        let shape = |entry: &Entry| match entry {
            Entry::Directory => Shape::Directory,
            Entry::File(content) => Shape::File(content.borrow().clone()),
            Entry::Symlink(target) => Shape::Symlink(target.to_vec()),
        };
        self.entries.iter().map(|(path, entry)| (path.clone(), shape(entry))).collect()
    }

    fn get(&self, path: &str) -> Result<&Entry, Errno> {
        self.parent(path)?;
        self.entries.get(path).ok_or(Errno::ENOENT)
    }

    /// Checks that every directory above a path is one.
    fn parent(&self, path: &str) -> Result<(), Errno> {
        for (at, _) in path.match_indices('/') {
            match self.entries.get(&path[..at]) {
                Some(Entry::Directory) => {}
                Some(_) => return Err(Errno::ENOTDIR),
                None => return Err(Errno::ENOENT),
            }
        }
        Ok(())
    }

    fn is_empty(&self, path: &str) -> bool {
        let inside = format!("{path}/");
        !self.entries.keys().any(|other| other.starts_with(&inside))
    }

    pub(crate) fn file(&self, path: &str) -> Result<Bytes, Errno> {
        match self.get(path)? {
            Entry::File(content) => Ok(content.clone()),
            Entry::Directory => Err(Errno::EISDIR),
            Entry::Symlink(_) => Err(Errno::ELOOP),
        }
    }

    pub(crate) fn create(&mut self, path: &str) -> Result<Bytes, Errno> {
        self.absent(path)?;
        let content = Bytes::default();
        self.entries.insert(path.to_owned(), Entry::File(content.clone()));
        Ok(content)
    }

    pub(crate) fn make_directory(&mut self, path: &str) -> Result<(), Errno> {
        self.absent(path)?;
        self.entries.insert(path.to_owned(), Entry::Directory);
        Ok(())
    }

    fn absent(&self, path: &str) -> Result<(), Errno> {
        self.parent(path)?;
        if self.entries.contains_key(path) { Err(Errno::EEXIST) } else { Ok(()) }
    }

    pub(crate) fn unlink(&mut self, path: &str) -> Result<(), Errno> {
        match self.get(path)? {
            Entry::Directory => Err(Errno::EISDIR),
            _ => {
                self.entries.remove(path);
                Ok(())
            }
        }
    }

    pub(crate) fn remove_directory(&mut self, path: &str) -> Result<(), Errno> {
        match self.get(path)? {
            Entry::Directory if self.is_empty(path) => {
                self.entries.remove(path);
                Ok(())
            }
            Entry::Directory => Err(Errno::ENOTEMPTY),
            _ => Err(Errno::ENOTDIR),
        }
    }

    pub(crate) fn link(&mut self, from: &str, to: &str) -> Result<(), Errno> {
        let entry = self.get(from)?.clone();
        self.absent(to)?;
        self.entries.insert(to.to_owned(), entry);
        Ok(())
    }

    pub(crate) fn is_directory(&self, path: &str) -> bool {
        matches!(self.entries.get(path), Some(Entry::Directory))
    }

    pub(crate) fn rename(&mut self, from: &str, to: &str, replace: bool) -> Result<(), Errno> {
        self.parent(from)?;
        self.parent(to)?;
        let moved = self.get(from)?.clone();
        match self.entries.get(to) {
            Some(_) if !replace => return Err(Errno::EEXIST),
            _ if from == to => return Ok(()),
            Some(old) => match (&moved, old) {
                (Entry::File(a), Entry::File(b)) if Rc::ptr_eq(a, b) => return Ok(()),
                (Entry::Symlink(a), Entry::Symlink(b)) if Rc::ptr_eq(a, b) => return Ok(()),
                (Entry::Directory, Entry::Directory) if !self.is_empty(to) => return Err(Errno::ENOTEMPTY),
                (Entry::Directory, Entry::Directory) => {}
                (Entry::Directory, _) => return Err(Errno::ENOTDIR),
                (_, Entry::Directory) => return Err(Errno::EISDIR),
                _ => {}
            },
            None => {}
        }
        let inside = format!("{from}/");
        if matches!(moved, Entry::Directory) && to.starts_with(&inside) {
            return Err(Errno::EINVAL);
        }
        self.entries.remove(to);
        let below: Vec<String> =
            self.entries.keys().filter(|path| path.starts_with(&inside)).cloned().collect();
        for path in below {
            let entry = self.entries.remove(&path).unwrap();
            self.entries.insert(format!("{to}/{}", &path[inside.len()..]), entry);
        }
        self.entries.remove(from);
        self.entries.insert(to.to_owned(), moved);
        Ok(())
    }
}

pub(crate) fn write(content: &Bytes, offset: usize, data: &[u8]) {
    let mut content = content.borrow_mut();
    let end = offset + data.len();
    if content.len() < end && !data.is_empty() {
        content.resize(end, 0);
    }
    content[offset..end].copy_from_slice(data);
}

pub(crate) fn read(content: &Bytes, offset: usize, length: usize) -> Vec<u8> {
    let content = content.borrow();
    content[offset.min(content.len())..(offset + length).min(content.len())].to_vec()
}
