//! Takes off the attributes that say where in the lower something came from.
//!
//! For a tree that is an upper no longer: there is no lower any more that they could name, and a copy with attributes
//! would carry them on. Safe to repeat; what has none is passed over, and so is what somebody removes meanwhile.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::mount::upper::real_disk::ORIGIN_ATTRIBUTE;

/// Removes the origin of a directory and of everything below it; links have none.
pub fn forget_origins(directory: &Path) -> io::Result<()> {
    remove_attribute(directory)?;
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = match fs::read_dir(&directory) {
            Err(error) if is_gone(&error) => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let kind = match entry.file_type() {
                Err(error) if is_gone(&error) => continue,
                kind => kind?,
            };
            if kind.is_symlink() {
                continue;
            }
            let path = entry.path();
            remove_attribute(&path)?;
            if kind.is_dir() {
                directories.push(path);
            }
        }
    }
    Ok(())
}

#[expect(unsafe_code, reason = "no wrapper for extended attributes")]
fn remove_attribute(path: &Path) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    // SAFETY: both strings end in NUL and outlive the call.
    let outcome = unsafe { libc::lremovexattr(name.as_ptr(), ORIGIN_ATTRIBUTE.as_ptr()) };
    if outcome == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // There is none; or the file system has none at all, such as a copy's.
        Some(libc::ENODATA | libc::EOPNOTSUPP) => Ok(()),
        _ if is_gone(&error) => Ok(()),
        _ => Err(error),
    }
}

/// Tells whether something else has come of a path since it was listed.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::upper::local_disk::LocalDisk;
    use crate::mount::upper::real_disk::RealDisk;

    #[test]
    fn nothing_below_keeps_its_origin() {
        let scratch = tempfile::tempdir().unwrap();
        let disk = RealDisk::open(scratch.path()).unwrap();
        let (directory, file) = (Path::new("base"), Path::new("base/1"));
        disk.make_directory(directory, 0o700).unwrap();
        disk.create(file, 0o600).unwrap();
        std::os::unix::fs::symlink("nowhere", scratch.path().join("base/link")).unwrap();
        for path in [directory, file] {
            disk.set_origin(path, b"1 8192 base/1").unwrap();
        }
        for _ in 0..2 {
            forget_origins(scratch.path()).unwrap();
            assert_eq!((disk.origin(directory).unwrap(), disk.origin(file).unwrap()), (None, None));
        }
    }
}
