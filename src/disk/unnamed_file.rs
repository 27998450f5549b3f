//! A file that has no name yet: written ahead of the moment at which it is wanted, and gone with whoever holds it.
//!
//! What a process that is killed was writing is taken away by the file system, so there is nothing to clean up. Whoever
//! has the descriptor may give it a name, another process as well. File systems that cannot have such files (NFS) say
//! so when one is begun; a name on another file system is refused. Deliberately absent: any sync.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::linkat;

use crate::disk::Error;
use crate::disk::durable::Create;
use crate::disk::owner::Owner;

/// Begins an empty file in a folder.
pub fn begin_unnamed(folder: &Path, create: Create) -> Result<File, Error> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(create.mode)
        .custom_flags(libc::O_TMPFILE)
        .open(folder)
        .map_err(Error::at("create a file without a name in", folder))?;
    file.set_permissions(Permissions::from_mode(create.mode))
        .map_err(Error::at("set the mode of a file in", folder))?;
    if let Some(Owner { uid, gid }) = create.owner {
        fchown(&file, Some(uid), Some(gid)).map_err(Error::at("change the owner of a file in", folder))?;
    }
    Ok(file)
}

/// Gives a file a name that is free.
pub fn link_unnamed(file: &File, path: &Path) -> Result<(), Error> {
    let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
    // The entry of /proc stands for the file itself, and the system follows it.
    linkat(AT_FDCWD, opened.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)
        .map_err(|errno| Error::at("link", path)(errno.into()))
}

/// Tells whether one file may take the place of the other: it has no name, and file system, owner and mode are the same.
pub fn may_replace(unnamed: &File, named: &File) -> bool {
    let what = |found: &Metadata| (found.is_file(), found.dev(), found.uid(), found.gid(), found.mode());
    match (unnamed.metadata(), named.metadata()) {
        (Ok(unnamed), Ok(named)) => unnamed.nlink() == 0 && what(&unnamed) == what(&named),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_seen_under_no_name_until_it_is_given_one() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = begin_unnamed(folder.path(), Create::PRIVATE_FILE).unwrap();
        file.write_all(b"content").unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let path = folder.path().join("name");
        link_unnamed(&file, &path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"content");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert!(link_unnamed(&file, &path).is_err(), "what stands there is not replaced");
    }

    #[test]
    fn only_a_nameless_file_of_the_same_kind_takes_a_place() {
        let folder = tempfile::tempdir().unwrap();
        let named = |mode| {
            let path = folder.path().join(format!("{mode:o}"));
            let file = File::create(&path).unwrap();
            file.set_permissions(Permissions::from_mode(mode)).unwrap();
            file
        };
        let file = begin_unnamed(folder.path(), Create::PRIVATE_FILE).unwrap();
        assert!(may_replace(&file, &named(0o600)));
        assert!(!may_replace(&file, &named(0o640)));
        assert!(!may_replace(&named(0o600), &file));
        assert!(!may_replace(&file, &File::open("/proc/self/status").unwrap()));
        link_unnamed(&file, &folder.path().join("taken")).unwrap();
        assert!(!may_replace(&file, &named(0o600)), "it has a name already");
    }
}
