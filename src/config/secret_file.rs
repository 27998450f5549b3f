//! Files that hold a secret: refused where others than their owner can read or write them.
//!
//! The rule is PostgreSQL's for `ssl_key_file`: 0600, or 0640 where root owns the file and lends it to a group.
//! Mode and content are taken from one open file, so nobody exchanges it in between.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::error::{Error, Place, Problem, Result};
use super::table::Table;

/// The largest secret read; an RSA key of 8192 bits takes 6.4 kB.
const SECRET_BYTES_MAX: u64 = 64 * 1024;

/// A file that the configuration names, for reading it later and complaining at the place that names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedFile {
    /// The file.
    pub path: PathBuf,
    place: Place,
    key: String,
    section: String,
}

impl NamedFile {
    pub(super) fn read(table: &Table<'_>, key: &str) -> Result<Option<Self>> {
        let Some(path) = table.path(key)? else { return Ok(None) };
        let (place, key, section) = table.at(key).into_parts();
        Ok(Some(Self { path, place, key, section }))
    }

    /// Returns the content of a file that others must not read.
    pub(super) fn secret(&self) -> Result<Zeroizing<String>> {
        read_secret("the file", &self.path).map_err(|error| self.complain(error.to_string(), error.hint()))
    }

    /// Returns the content of a file that is no secret.
    pub(super) fn public(&self) -> Result<String> {
        read_public("the file", &self.path).map_err(|error| self.complain(error.to_string(), error.hint()))
    }

    /// Complains about what the file turned out to be.
    pub(super) fn complain(&self, reason: String, hint: Option<String>) -> Error {
        let problem =
            Problem::BadValue { key: self.key.clone(), section: self.section.clone(), reason, hint };
        Error::Content { place: self.place.clone(), problem }
    }
}

/// Reads a secret after checking who else could.
pub fn read_secret(what: &'static str, path: &Path) -> Result<Zeroizing<String>> {
    let unreadable = |source| Error::Unreadable { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    check_mode(what, path, &file)?;
    read_bounded(file).map_err(unreadable)
}

/// Reads a file that is no secret, with the same bound.
pub(super) fn read_public(what: &'static str, path: &Path) -> Result<String> {
    let text = File::open(path).and_then(read_bounded);
    let text = text.map_err(|source| Error::Unreadable { what, path: path.to_owned(), source })?;
    Ok(text.to_string())
}

/// Refuses an open file that others than its owner can read or write.
pub(super) fn check_mode(what: &'static str, path: &Path, file: &File) -> Result<()> {
    let metadata =
        file.metadata().map_err(|source| Error::Unreadable { what, path: path.to_owned(), source })?;
    let mode = metadata.mode() & 0o7777;
    let exposed = |reader| Err(Error::Exposed { what, path: path.to_owned(), mode, reader });
    match mode {
        _ if mode & 0o007 != 0 => exposed("everybody"),
        _ if mode & 0o030 != 0 || mode & 0o040 != 0 && metadata.uid() != 0 => exposed("its group"),
        _ => Ok(()),
    }
}

fn read_bounded(file: File) -> io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(8 * 1024));
    file.take(SECRET_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > SECRET_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is too long"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_the_owner_may_read_a_secret() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("it's a key.pem");
        fs::write(&path, "secret").unwrap();
        let root_owned = fs::metadata(&path).unwrap().uid() == 0;
        for (mode, reader) in [
            (0o600, None),
            (0o400, None),
            (0o640, (!root_owned).then_some("its group")),
            (0o660, Some("its group")),
            (0o644, Some("everybody")),
            (0o604, Some("everybody")),
            (0o602, Some("everybody")),
        ] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            match (read_secret("the private key", &path), reader) {
                (Ok(text), None) => assert_eq!(*text, "secret"),
                (Err(error), Some(reader)) => {
                    let shown = error.to_string();
                    assert!(shown.starts_with("the private key \"/"), "{shown}");
                    assert!(shown.ends_with(&format!("has mode {mode:04o}: {reader} can use it")), "{shown}");
                    let hint = error.hint().unwrap();
                    assert!(
                        hint.starts_with("chmod 600 '/") && hint.ends_with(r"it'\''s a key.pem'"),
                        "{hint}"
                    );
                }
                (outcome, _) => panic!("{mode:o}: {outcome:?}"),
            }
        }
    }

    #[test]
    fn what_is_missing_or_endless_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let error = read_secret("the private key", &scratch.path().join("none")).unwrap_err();
        assert!(error.to_string().ends_with("none\": No such file or directory (os error 2)"), "{error}");
        let error = read_public("the public key", Path::new("/dev/zero")).unwrap_err();
        assert!(error.to_string().ends_with("\"/dev/zero\": the file is too long"), "{error}");
    }
}
