//! Reading the small files in which Walden remembers something on this host, whole and up to a limit.
//!
//! They are Walden's own, and still anything may be there: a log that somebody redirected into the wrong file, or what
//! the owner of a directory made of it. What is longer than a limit is refused before memory is taken for it.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::disk::Error;
use crate::disk::owner::Owner;

/// Documents are longer only by paths and warnings, of which a cluster has thousands at most.
pub const DOCUMENT_BYTES_MAX: u64 = 16 << 20;

/// Reads a file; `what` says in messages what it should be.
///
/// # Errors
/// `Malformed` where it is longer than `bytes_max`; else `Io`, which tells whether there is none.
pub fn read(path: &Path, what: &'static str, bytes_max: u64) -> Result<Vec<u8>, Error> {
    read_owned(path, what, bytes_max).map(|(bytes, _)| bytes)
}

fn read_owned(path: &Path, what: &'static str, bytes_max: u64) -> Result<(Vec<u8>, Owner), Error> {
    let mut bytes = Vec::new();
    // By what is read, not by the length: a device or a file of /proc has none.
    // A pipe that nobody writes into is at its end, and not waited for.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let read = opened.and_then(|file| {
        let metadata = file.metadata()?;
        file.take(bytes_max + 1).read_to_end(&mut bytes)?;
        Ok(Owner { uid: metadata.uid(), gid: metadata.gid() })
    });
    let owner = read.map_err(Error::at("read", path))?;
    if bytes.len() as u64 > bytes_max {
        let detail = format!("it has more than {bytes_max} bytes");
        return Err(Error::Malformed { path: path.to_owned(), what, detail });
    }
    Ok((bytes, owner))
}

/// Reads a document.
///
/// # Errors
/// `Malformed` where it is not one, or is longer than [`DOCUMENT_BYTES_MAX`]; else `Io`.
pub fn read_document<T: DeserializeOwned>(path: &Path, what: &'static str) -> Result<T, Error> {
    read_owned_document(path, what).map(|(document, _)| document)
}

/// Reads a document and says whose it is, by the very file that was read.
///
/// # Errors
/// As [`read_document`].
pub fn read_owned_document<T: DeserializeOwned>(
    path: &Path,
    what: &'static str,
) -> Result<(T, Owner), Error> {
    let (bytes, owner) = read_owned(path, what, DOCUMENT_BYTES_MAX)?;
    let document = serde_json::from_slice(&bytes).map_err(|error| Error::Malformed {
        path: path.to_owned(),
        what,
        detail: error.to_string(),
    })?;
    Ok((document, owner))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit_and_refused_beyond_it() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("state");
        assert!(read(&path, "state", 4).unwrap_err().is_not_found());
        std::fs::write(&path, b"1234").unwrap();
        assert_eq!(read(&path, "state", 4).unwrap(), b"1234");
        assert_eq!(read_document::<u32>(&path, "state").unwrap(), 1234);
        let owned = read_owned_document::<u32>(&path, "state").unwrap();
        assert_eq!(owned, (1234, Owner::of(&path).unwrap()));
        let refused = read(&path, "state", 3).unwrap_err().to_string();
        assert!(refused.ends_with("is not readable as state: it has more than 3 bytes"), "{refused}");
        let refused = read(Path::new("/dev/zero"), "state", 1 << 10).unwrap_err();
        assert!(matches!(refused, Error::Malformed { .. }));
        std::fs::write(&path, b"12x").unwrap();
        assert!(matches!(read_document::<u32>(&path, "state"), Err(Error::Malformed { .. })));
    }
}
