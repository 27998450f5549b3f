//! Whether another user could read a file, by its mode and those of the directories above it.
//!
//! Root asks before it leaves a command to that user. What an access control list grants is not seen, nor what a
//! security module forbids: an answer for a warning, not for a refusal.

use std::ffi::CString;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::{Gid, Uid, User, getgrouplist};

use crate::disk::Owner;

/// A user with its groups.
#[derive(Debug)]
pub struct Reader {
    uid: u32,
    groups: Vec<u32>,
}

impl Reader {
    /// Looks up the groups of a user; one that this host does not know has the one it comes with.
    pub fn of(owner: Owner) -> Self {
        let user = User::from_uid(Uid::from_raw(owner.uid)).ok().flatten();
        let listed = user
            .and_then(|user| CString::new(user.name).ok())
            .and_then(|name| getgrouplist(&name, Gid::from_raw(owner.gid)).ok());
        let groups =
            listed.map_or_else(|| vec![owner.gid], |list| list.into_iter().map(Gid::as_raw).collect());
        Self { uid: owner.uid, groups }
    }

    /// Returns whether the user may read a file; true for one that is not there, which is another trouble.
    pub fn may_read(&self, path: &Path) -> bool {
        const READ: u32 = 0o4;
        const SEARCH: u32 = 0o1;
        let Ok(real) = fs::canonicalize(path) else { return true };
        real.ancestors().enumerate().all(|(above, path)| {
            let right = if above == 0 { READ } else { SEARCH };
            fs::metadata(path).is_ok_and(|metadata| self.has(right, &metadata))
        })
    }

    fn has(&self, right: u32, metadata: &Metadata) -> bool {
        let shift = if metadata.uid() == self.uid {
            6
        } else if self.groups.contains(&metadata.gid()) {
            3
        } else {
            0
        };
        self.uid == 0 || metadata.mode() >> shift & right != 0
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_first_class_that_fits_decides_and_every_directory_counts() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("key.pem");
        fs::write(&file, "x").unwrap();
        let own = Owner::of(&file).unwrap();
        let set = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        let reader = |uid, gid| Reader { uid, groups: vec![gid] };
        let (group, other) = (reader(own.uid + 1, own.gid), reader(own.uid + 1, own.gid + 1));
        for (folder, mode, by_group, by_other) in [
            (0o755, 0o604, false, true),
            (0o755, 0o640, true, false),
            (0o755, 0o600, false, false),
            (0o701, 0o644, false, true),
            (0o710, 0o644, true, false),
        ] {
            set(&file, mode);
            set(scratch.path(), folder);
            assert_eq!(group.may_read(&file), by_group, "{folder:o} {mode:o}");
            assert_eq!(other.may_read(&file), by_other, "{folder:o} {mode:o}");
        }
        assert!(other.may_read(&scratch.path().join("missing")));
        assert!(reader(0, 0).may_read(&file));
    }
}
