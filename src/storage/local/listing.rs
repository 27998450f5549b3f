//! Listings of a folder tree in the order of object keys.
//!
//! Keys sort by their bytes, so a folder `a` stands where `a/` does: after `a-b` and `a.b`, before `a0`.
//! Each folder's entries are sorted that way before the walk goes on, a folder that lies wholly before the
//! start is not opened, and nothing past the limit is examined. Memory is bounded by the largest folder,
//! not by the repository.
//!
//! Names that are not object keys (staged files, an administrator's notes) are not ours and are passed
//! over. Whatever vanishes during the walk was deleted, and is left out.

use std::ffi::CStr;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FileStat, fstatat};

use super::super::error::{Error, Verb};
use super::super::key::ObjectKey;
use super::super::store::{FOLDER_ENTRIES_MAX, Folder, ObjectMeta, folder_name};
use super::errno::error_of;
use super::folder::Root;
use super::{is_regular, meta};

/// Lists objects in and below `prefix` (empty, or ending in a slash), ascending.
pub(super) fn list(
    root: &Root,
    prefix: &str,
    after: Option<&ObjectKey>,
    limit: usize,
) -> Result<Vec<ObjectMeta>, Error> {
    root.check_present(Verb::List, folder_name(prefix))?;
    let mut walk = Walk { root, after: after.map_or("", ObjectKey::as_str), limit, found: Vec::new() };
    walk.folder(prefix)?;
    Ok(walk.found)
}

/// Lists the folders and objects directly in `prefix`.
pub(super) fn list_folder(root: &Root, prefix: &str) -> Result<Folder, Error> {
    root.check_present(Verb::ListFolder, folder_name(prefix))?;
    let mut folder = Folder::default();
    for entry in entries(root, Verb::ListFolder, prefix)? {
        match entry.name.strip_suffix('/') {
            Some(name) => folder.folders.push(name.to_owned()),
            None => folder.objects.extend(examine(root, Verb::ListFolder, prefix, &entry.name)?),
        }
    }
    // Entries are in the order of keys, in which `a-b/` stands before `a/`.
    folder.folders.sort_unstable();
    Ok(folder)
}

struct Walk<'a> {
    root: &'a Root,
    after: &'a str,
    limit: usize,
    found: Vec<ObjectMeta>,
}

impl Walk<'_> {
    /// Walks one folder; the depth is bounded by the length of a key, for what is longer is passed over.
    fn folder(&mut self, prefix: &str) -> Result<(), Error> {
        for entry in entries(self.root, Verb::List, prefix)? {
            if self.found.len() >= self.limit {
                return Ok(());
            }
            let path = format!("{prefix}{}", entry.name);
            if path.ends_with('/') {
                // Every key in there begins with `path`: none is wanted if `after` is past all that do.
                if self.after < path.as_str() || self.after.starts_with(&path) {
                    self.folder(&path)?;
                }
            } else if self.after < path.as_str() {
                self.found.extend(examine(self.root, Verb::List, prefix, &entry.name)?);
            }
        }
        Ok(())
    }
}

/// One name in a folder, with a slash at its end if it is a folder itself.
struct Entry {
    name: String,
}

/// Reads a folder's entries, those that can be part of an object key, in the order of keys.
fn entries(root: &Root, verb: Verb, prefix: &str) -> Result<Vec<Entry>, Error> {
    let failed = |errno| error_of(verb, folder_name(prefix), errno);
    let folder = match root.open_folder(prefix.strip_suffix('/').unwrap_or(prefix)) {
        Ok(folder) => folder,
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(Vec::new()),
        Err(errno) => return Err(failed(errno)),
    };
    let mut folder = Dir::from_fd(folder).map_err(failed)?;
    let mut raw = Vec::new();
    for entry in folder.iter() {
        let entry = entry.map_err(failed)?;
        if let Some(name) = key_component(prefix, entry.file_name()) {
            raw.push((name, entry.file_type()));
        }
        if raw.len() > FOLDER_ENTRIES_MAX {
            let size_max = FOLDER_ENTRIES_MAX as u64;
            return Err(Error::TooLarge { key: prefix.to_owned(), size: raw.len() as u64, size_max });
        }
    }
    let mut entries = Vec::with_capacity(raw.len());
    for (name, kind) in raw {
        match kind {
            Some(Type::File) => entries.push(Entry { name }),
            Some(Type::Directory) => entries.push(Entry { name: format!("{name}/") }),
            // A link, or a file system that does not say.
            Some(Type::Symlink) | None => {
                let Some(found) = look(&folder, &name).map_err(failed)? else { continue };
                match found.st_mode & libc::S_IFMT {
                    libc::S_IFREG => entries.push(Entry { name }),
                    libc::S_IFDIR => entries.push(Entry { name: format!("{name}/") }),
                    _ => (),
                }
            }
            Some(_) => (),
        }
    }
    entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// Returns a name if it is a component of an object key that is not too long at this depth.
fn key_component(prefix: &str, name: &CStr) -> Option<String> {
    let name = name.to_str().ok()?;
    ObjectKey::parse(&format!("{prefix}{name}")).ok().map(|_| name.to_owned())
}

fn look(folder: &Dir, name: &str) -> Result<Option<FileStat>, Errno> {
    match fstatat(folder, name, AtFlags::empty()) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Reads size and age of an object, or nothing if it is gone.
fn examine(root: &Root, verb: Verb, prefix: &str, name: &str) -> Result<Option<ObjectMeta>, Error> {
    let key = ObjectKey::parse(&format!("{prefix}{name}")).expect("checked when the folder was read");
    match fstatat(root.fd(), key.as_str(), AtFlags::empty()) {
        Ok(found) if is_regular(&found) => Ok(Some(meta(key, &found))),
        Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(errno) => Err(error_of(verb, key.as_str(), errno)),
    }
}
