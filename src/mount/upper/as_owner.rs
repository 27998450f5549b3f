//! Has a new name appear with its owner. Made as root and given away after that, a kill in between leaves a file of root's in
//! the directory of a server, which can never open it: not to write what recovery wants there, not to back it up.
//!
//! The calling thread alone is another user meanwhile, and for file systems only. Where that user's rights do not reach,
//! the name is made as before. Deliberately absent: groups beyond the owner's own.

use std::io;

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use crate::disk::Owner;

/// Who the thread was while this is there.
struct Guise {
    uid: Uid,
    gid: Gid,
}

/// Makes a name as `owner`; as oneself where this process is not root.
pub(super) fn as_owner<T>(owner: Owner, make: impl Fn() -> io::Result<T>) -> io::Result<T> {
    if owner.is_root() || !Owner::current().is_root() {
        return make();
    }
    let guise = Guise::of(owner);
    let made = make();
    drop(guise);
    match made {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => make(),
        made => made,
    }
}

impl Guise {
    fn of(owner: Owner) -> Self {
        // The user last: without root's rights no group could be taken.
        let gid = setfsgid(Gid::from_raw(owner.gid));
        Self { gid, uid: setfsuid(Uid::from_raw(owner.uid)) }
    }
}

impl Drop for Guise {
    fn drop(&mut self) {
        setfsuid(self.uid);
        setfsgid(self.gid);
        // No call tells whether it has failed but the next one, by who it finds; a number that nobody has changes nothing.
        let is_itself =
            setfsuid(Uid::from_raw(u32::MAX)) == self.uid && setfsgid(Gid::from_raw(u32::MAX)) == self.gid;
        if !is_itself {
            // A thread that stays somebody else must do nothing more.
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;

    #[test]
    fn a_name_appears_with_its_owner_and_the_thread_is_itself_again() {
        let (scratch, own) = (tempfile::tempdir().unwrap(), Owner::current());
        let make = |name: &str| File::create_new(scratch.path().join(name)).map(drop);
        let owner_of = |name: &str| Owner::of(&scratch.path().join(name)).unwrap();
        if !own.is_root() {
            as_owner(Owner { uid: own.uid + 1, ..own }, || make("own")).unwrap();
            assert_eq!(owner_of("own"), own, "who is not root makes everything as himself");
            return;
        }
        let other = Owner { uid: 65534, gid: 65533 };
        chown(scratch.path(), Some(other.uid), Some(other.gid)).unwrap();
        as_owner(other, || make("other")).unwrap();
        assert_eq!(owner_of("other"), other);
        make("own").unwrap();
        assert_eq!(owner_of("own"), own);
        assert_eq!(as_owner(other, || make("own")).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        // Its rights do not reach here.
        chown(scratch.path(), Some(own.uid), Some(own.gid)).unwrap();
        fs::set_permissions(scratch.path(), Permissions::from_mode(0o700)).unwrap();
        as_owner(other, || make("given later")).unwrap();
        assert_eq!(owner_of("given later"), own);
    }
}
