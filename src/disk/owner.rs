//! Who a path belongs to, and giving it away.
//!
//! Root creates files on behalf of a folder's owner (the state folder, a clone, a `file://` repository);
//! an ordinary user only ever owns what it creates, so giving to oneself is no system call at all.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::disk::Error;

/// A user and a group by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

impl Owner {
    /// Returns the owner of a path, following links.
    pub fn of(path: &Path) -> Result<Self, Error> {
        let metadata = std::fs::metadata(path).map_err(Error::at("stat", path))?;
        Ok(Self { uid: metadata.uid(), gid: metadata.gid() })
    }

    /// Returns the effective user and group of this process.
    pub fn current() -> Self {
        Self { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() }
    }

    /// Returns the user as messages name it: by its name, where this host has one, and its number.
    pub fn user(self) -> String {
        match nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(self.uid)) {
            Ok(Some(user)) => format!("{} ({})", user.name, self.uid),
            _ => self.uid.to_string(),
        }
    }

    /// Returns true for the superuser.
    pub fn is_root(self) -> bool {
        self.uid == 0
    }

    /// Makes `path` belong to this owner; a symbolic link itself, not what it names.
    ///
    /// One who is not root cannot give to a group that he is not in: that of what is his already stays, as it does for
    /// whatever he makes in a folder that root made for him.
    pub fn give(self, path: &Path) -> Result<(), Error> {
        let metadata = std::fs::symlink_metadata(path).map_err(Error::at("stat", path))?;
        if (metadata.uid(), metadata.gid()) == (self.uid, self.gid) {
            return Ok(());
        }
        match std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid)) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied && metadata.uid() == self.uid => Ok(()),
            given => given.map_err(Error::at("change the owner of", path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_creates_is_ones_own_and_giving_it_to_oneself_succeeds() {
        let scratch = tempfile::tempdir().unwrap();
        let owner = Owner::of(scratch.path()).unwrap();
        assert_eq!(owner.uid, Owner::current().uid);
        owner.give(scratch.path()).unwrap();
        let link = scratch.path().join("dangling");
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        owner.give(&link).unwrap();
        assert!(Owner::of(&link).unwrap_err().is_not_found());
    }
}
