//! What can happen to an object: some bytes of it, all of it, its place.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use crate::support::Account;

/// Where in an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    First,
    Middle,
    Last,
}

/// What befalls an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Damage {
    /// One bit is another.
    Flip(At),
    /// The second half is gone.
    Truncate,
    /// All bytes are gone, the object is not.
    Empty,
    /// Bytes follow that do not belong to it.
    Extend,
    /// The object is gone.
    Remove,
    /// Another object of its kind stands in its place.
    ReplaceBy(PathBuf),
    /// It and another stand in each other's places.
    SwapWith(PathBuf),
}

impl Damage {
    /// Every damage that needs no second object.
    pub const ALONE: [Self; 7] = [
        Self::Flip(At::First),
        Self::Flip(At::Middle),
        Self::Flip(At::Last),
        Self::Truncate,
        Self::Empty,
        Self::Extend,
        Self::Remove,
    ];

    /// Does it to an object of a `file://` repository.
    pub fn inflict(&self, object: &Path) {
        let bytes = fs::read(object).unwrap();
        match self {
            Self::Flip(at) => {
                let mut bytes = bytes;
                let place = match at {
                    At::First => 0,
                    At::Middle => bytes.len() / 2,
                    At::Last => bytes.len() - 1,
                };
                bytes[place] ^= 1;
                write(object, &bytes);
            }
            Self::Truncate => write(object, &bytes[..bytes.len() / 2]),
            Self::Empty => write(object, &[]),
            Self::Extend => write(object, &[&bytes[..], b"more"].concat()),
            Self::Remove => fs::remove_file(object).unwrap(),
            Self::ReplaceBy(other) => write(object, &fs::read(other).unwrap()),
            Self::SwapWith(other) => {
                let theirs = fs::read(other).unwrap();
                write(other, &bytes);
                write(object, &theirs);
            }
        }
    }
}

/// Writes an object past the store, as the store would have left it.
pub fn write(object: &Path, bytes: &[u8]) {
    // Objects are read-only: a new file takes their place.
    if object.exists() {
        fs::remove_file(object).unwrap();
    }
    fs::write(object, bytes).unwrap();
    fs::set_permissions(object, fs::Permissions::from_mode(0o600)).unwrap();
    let Account { uid, gid } = Account::of_postgresql();
    if nix::unistd::geteuid().is_root() {
        chown(object, Some(uid), Some(gid)).unwrap();
    }
}
