//! From what went wrong to the error number a program sees.
//!
//! Each mapping is one exhaustive match, so that a new error has to be given a number. The rule behind them:
//! whatever keeps the mount from knowing the right bytes is `EIO`, never an end of file and never zeros. Whoever
//! turns a lower's error into a number also writes the log line that names the object, because the reader only
//! sees the number.

use std::io;

pub use nix::errno::Errno;

use crate::disk;
use crate::mount::lower::LowerError;

/// Returns the error number of a lower's error and logs the object it names.
pub fn of_lower(error: &LowerError) -> Errno {
    match error {
        LowerError::Damaged { object, .. }
        | LowerError::Untrusted { object, .. }
        | LowerError::Missing { object }
        | LowerError::Unreachable { object, .. } => {
            tracing::error!(%object, "{error}");
            Errno::EIO
        }
        LowerError::Contract { .. } => {
            tracing::error!("{error}");
            Errno::EIO
        }
    }
}

/// Returns the error number of a local file's error.
pub fn of_disk(error: &disk::Error) -> Errno {
    match error {
        disk::Error::Io { source, .. } => of_io(source),
        disk::Error::Exists { .. } => Errno::EEXIST,
        disk::Error::Locked { .. } => Errno::EBUSY,
        disk::Error::BoundElsewhere { .. } | disk::Error::Changed { .. } | disk::Error::Malformed { .. } => {
            Errno::EIO
        }
    }
}

/// Returns the number the system gave, or `EIO` where the error is not the system's.
pub fn of_io(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_a_lower_reports_looks_like_an_absent_file() {
        let object = || "main/basebackups/x/packs/0-aa".to_owned();
        let detail = || "tag mismatch".to_owned();
        for error in [
            LowerError::Damaged { object: object(), detail: detail() },
            LowerError::Untrusted { object: object(), detail: detail() },
            LowerError::Missing { object: object() },
            LowerError::Unreachable { object: object(), detail: detail() },
            LowerError::Contract { detail: detail() },
        ] {
            assert_eq!(of_lower(&error), Errno::EIO);
        }
    }

    #[test]
    fn a_full_disk_stays_a_full_disk() {
        assert_eq!(of_io(&io::Error::from_raw_os_error(libc::ENOSPC)), Errno::ENOSPC);
        assert_eq!(of_io(&io::Error::other("no number")), Errno::EIO);
    }
}
