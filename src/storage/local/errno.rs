//! The kernel's error numbers in the words of `storage::Error`, one table for the whole module.
//!
//! Deliberately absent: ENOENT. Whether it proves an absence depends on what was looked up.

use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use super::super::error::{Error, Verb};

/// Translates an error number; absence is for the caller to decide, who knows what was looked up.
pub(super) fn error_of(verb: Verb, key: &str, errno: Errno) -> Error {
    let key = key.to_owned();
    let source = Arc::new(io::Error::from(errno));
    match errno {
        Errno::EACCES | Errno::EPERM | Errno::EROFS => Error::Denied { verb, key, source: Some(source) },
        Errno::ENOSPC | Errno::EDQUOT => Error::Full { verb, key, source: Some(source) },
        // What network and user-space file systems say when their other end is gone.
        Errno::ESTALE
        | Errno::ETIMEDOUT
        | Errno::ENOTCONN
        | Errno::ECONNRESET
        | Errno::ECONNREFUSED
        | Errno::ECONNABORTED
        | Errno::EHOSTDOWN
        | Errno::EHOSTUNREACH
        | Errno::ENETUNREACH
        | Errno::EREMOTEIO => Error::Unreachable { verb, key, reason: None, source: Some(source) },
        _ => Error::Other { verb, key, source },
    }
}

/// Translates an error of the standard library.
pub(super) fn io_error_of(verb: Verb, key: &str, error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(number) => error_of(verb, key, Errno::from_raw(number)),
        None => Error::Other { verb, key: key.to_owned(), source: Arc::new(error) },
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::error::ErrorKind;
    use super::*;

    #[test]
    fn kinds_follow_what_can_be_done() {
        let kind = |errno| error_of(Verb::Create, "a", errno).kind();
        assert_eq!(kind(Errno::ENOSPC), ErrorKind::Full);
        assert_eq!(kind(Errno::EDQUOT), ErrorKind::Full);
        assert_eq!(kind(Errno::EACCES), ErrorKind::Denied);
        assert_eq!(kind(Errno::EROFS), ErrorKind::Denied);
        assert_eq!(kind(Errno::ENOTCONN), ErrorKind::Unreachable);
        assert_eq!(kind(Errno::EIO), ErrorKind::Other);
        let error = io_error_of(Verb::Get, "a", io::Error::from_raw_os_error(libc::ESTALE));
        assert_eq!(error.kind(), ErrorKind::Unreachable);
    }
}
