//! Forbids the process to write outside given directories, by Landlock: for users without a mount namespace.
//!
//! It can forbid but not redirect. A replayed CREATE TABLESPACE then ends recovery with `Permission denied` (seen on 13,
//! 15 and 18) and the source stays untouched; a clone whose WAL has one is therefore refused before its start where only
//! this is available. What Landlock does not cover (chmod, utime, sockets that exist) stays possible.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Devices a server writes to, besides its directories.
const DEVICES: [&str; 2] = ["/dev/null", "/dev/shm"];

// From linux/landlock.h, an interface that only grows.
const CREATE_RULESET_VERSION: libc::c_long = 1;
const RULE_PATH_BENEATH: libc::c_long = 1;
const WRITE_FILE: u64 = 1 << 1;
/// Removing and making every kind of entry.
const CHANGE_DIRECTORY: u64 = 0b1_1111_1111 << 4;
/// Linking and renaming across directories, from version 2.
const REFER: u64 = 1 << 13;
/// From version 3.
const TRUNCATE: u64 = 1 << 14;
/// Before version 3 truncation cannot be forbidden, and a file can be emptied that cannot be written.
const VERSION_MIN: i64 = 3;

/// Forbids the calling thread, and what it executes, to write anywhere but below `writable`.
///
/// # Errors
/// `Unsupported` where the kernel has no Landlock of version 3 (Linux 6.2); nothing is forbidden then.
pub fn restrict(writable: &[PathBuf]) -> io::Result<()> {
    if version() < VERSION_MIN {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel has no Landlock of version 3"));
    }
    let handled: u64 = WRITE_FILE | CHANGE_DIRECTORY | REFER | TRUNCATE;
    let rules = create_ruleset(handled)?;
    let devices = DEVICES.iter().map(Path::new).filter(|path| path.exists());
    for path in writable.iter().map(PathBuf::as_path).chain(devices) {
        let allowed = if path.is_dir() { handled } else { WRITE_FILE | TRUNCATE };
        add_rule(&rules, path, allowed)?;
    }
    enforce(&rules)
}

#[allow(unsafe_code, reason = "libc has no wrappers for Landlock")]
fn version() -> i64 {
    // SAFETY: with this flag the call takes no attributes and only answers a number.
    unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0_usize,
            CREATE_RULESET_VERSION,
        )
    }
}

#[allow(unsafe_code, reason = "libc has no wrappers for Landlock")]
fn create_ruleset(handled: u64) -> io::Result<OwnedFd> {
    // SAFETY: the attributes are one number that outlives the call, and their size is given.
    let fd = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const handled, size_of::<u64>(), 0_usize)
    };
    let fd = i32::try_from(checked(fd)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The attributes of a rule, packed as the kernel has them.
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: i32,
}

#[allow(unsafe_code, reason = "libc has no wrappers for Landlock")]
fn add_rule(rules: &OwnedFd, path: &Path, allowed: u64) -> io::Result<()> {
    let parent = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
    let rule = PathBeneath { allowed, parent: parent.as_raw_fd() };
    // SAFETY: the rule and the descriptor in it outlive the call.
    checked(unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            libc::c_long::from(rules.as_raw_fd()),
            RULE_PATH_BENEATH,
            &raw const rule,
            0_usize,
        )
    })?;
    Ok(())
}

#[allow(unsafe_code, reason = "libc has no wrappers for Landlock")]
fn enforce(rules: &OwnedFd) -> io::Result<()> {
    // Asked for by the kernel, so that no set-user-ID program is confused by the restriction.
    nix::sys::prctl::set_no_new_privs()?;
    // SAFETY: the call takes numbers alone and restricts the calling thread.
    checked(unsafe {
        libc::syscall(libc::SYS_landlock_restrict_self, libc::c_long::from(rules.as_raw_fd()), 0_usize)
    })?;
    Ok(())
}

fn checked(outcome: i64) -> io::Result<i64> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(outcome) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn nothing_outside_can_be_written_and_everything_can_be_read() {
        let scratch = tempfile::tempdir().unwrap();
        let [own, other] = ["own", "other"].map(|name| {
            let path = scratch.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("file"), "before").unwrap();
            path
        });
        let restricted = std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                restrict(std::slice::from_ref(&own))?;
                fs::write(own.join("file"), "after").unwrap();
                fs::rename(own.join("file"), own.join("renamed")).unwrap();
                fs::write("/dev/null", "x").unwrap();
                assert_eq!(fs::read_to_string(other.join("file")).unwrap(), "before");
                for refused in [
                    fs::write(other.join("file"), "after"),
                    fs::write(other.join("new"), "x"),
                    fs::remove_file(other.join("file")),
                    fs::create_dir(other.join("folder")),
                    fs::rename(own.join("renamed"), other.join("file")),
                ] {
                    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
                }
                Ok::<(), io::Error>(())
            });
            inside.join().unwrap()
        });
        match restricted {
            Ok(()) => fs::write(other.join("file"), "x").expect("the restriction is the thread's alone"),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported),
        }
    }
}
