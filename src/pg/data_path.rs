//! A path below the data directory.
//!
//! Bytes, not text: a file in PGDATA may have any name, with spaces, newlines or in no known encoding, and its
//! backup must have the same. What it may not do is leave the directory: a `DataPath` is relative, without
//! `.`, `..`, empty components and NUL, so joining it to a root stays below that root unless a symbolic link
//! leads out.
//!
//! As text it is itself, except that a backslash, a control character and a byte that is not UTF-8 are written
//! `\\` and `\x0a`; that form is read back without loss.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A relative path below PGDATA, such as `base/5/16384`, never empty.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DataPath(Vec<u8>);

/// Tells that bytes are not a path below PGDATA.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{path}\" is not a path below the data directory")]
pub struct DataPathError {
    path: String,
}

/// The longest path, Linux's `PATH_MAX`.
pub const DATA_PATH_BYTES_MAX: usize = 4096;
/// The longest path quoted back in an error.
const QUOTED_BYTES_MAX: usize = 200;

impl DataPath {
    /// Checks a path.
    pub fn new(path: impl Into<Vec<u8>>) -> Result<Self, DataPathError> {
        let path = path.into();
        let fits = path.len() <= DATA_PATH_BYTES_MAX && !path.contains(&0);
        let plain = |component: &[u8]| !component.is_empty() && component != b"." && component != b"..";
        if fits && path.split(|b| *b == b'/').all(plain) {
            return Ok(Self(path));
        }
        Err(DataPathError { path: Escaped(&path[..path.len().min(QUOTED_BYTES_MAX)]).to_string() })
    }

    /// Returns the bytes, components separated by `/`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the path for the operating system, relative to PGDATA.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// Returns the components from the outermost.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|b| *b == b'/')
    }

    /// Returns the last component.
    pub fn file_name(&self) -> &[u8] {
        self.split().1
    }

    /// Returns the folder it is in, none directly below PGDATA.
    pub fn parent(&self) -> Option<Self> {
        self.split().0.map(|parent| Self(parent.to_vec()))
    }

    /// Returns the path of an entry of this folder.
    pub fn join(&self, name: &[u8]) -> Result<Self, DataPathError> {
        Self::new([self.as_bytes(), b"/", name].concat())
    }

    /// Tells whether it is `folder` or lies below it.
    pub fn is_within(&self, folder: &[u8]) -> bool {
        self.0.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    }

    fn split(&self) -> (Option<&[u8]>, &[u8]) {
        match self.0.iter().rposition(|b| *b == b'/') {
            Some(slash) => (Some(&self.0[..slash]), &self.0[slash + 1..]),
            None => (None, &self.0),
        }
    }
}

/// Bytes shown as text that names exactly them.
struct Escaped<'a>(&'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in self.0.utf8_chunks() {
            for c in part.valid().chars() {
                match c {
                    '\\' => f.write_str("\\\\")?,
                    c if c.is_ascii_control() => write!(f, "\\x{:02x}", c as u32)?,
                    c => fmt::Write::write_char(f, c)?,
                }
            }
            for byte in part.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// Reads what `Escaped` wrote.
fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('\\') {
            bytes.push(b'\\');
            rest = after;
        } else {
            let (digits, after) = rest.strip_prefix('x')?.split_at_checked(2)?;
            let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            let byte = digits.bytes().all(lower).then(|| u8::from_str_radix(digits, 16).ok()).flatten()?;
            bytes.push(byte);
            rest = after;
        }
    }
    bytes.extend_from_slice(rest.as_bytes());
    Some(bytes)
}

impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Escaped(&self.0), f)
    }
}

impl fmt::Debug for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DataPath {
    type Err = DataPathError;

    fn from_str(text: &str) -> Result<Self, DataPathError> {
        let quoted = || text.chars().take(QUOTED_BYTES_MAX).collect();
        Self::new(unescape(text).ok_or_else(|| DataPathError { path: quoted() })?)
    }
}

impl Serialize for DataPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DataPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Failure 18.
    #[test]
    fn odd_names_are_kept_and_shown_without_loss() {
        let cases: [(&[u8], &str); 6] = [
            (b"base/5/16384", "base/5/16384"),
            (b"a b/c\nd", "a b/c\\x0ad"),
            (b"caf\xc3\xa9", "caf\u{e9}"),
            (b"caf\xe9/x", "caf\\xe9/x"),
            (b"back\\slash", "back\\\\slash"),
            (b"...", "..."),
        ];
        for (bytes, text) in cases {
            let path = DataPath::new(bytes).unwrap();
            assert_eq!(path.to_string(), text);
            assert_eq!(text.parse(), Ok(path));
        }
    }

    #[test]
    fn what_could_leave_the_directory_is_refused() {
        let wrong: [&[u8]; 11] = [
            b"",
            b"/",
            b"/etc/passwd",
            b"..",
            b"a/../b",
            b".",
            b"./a",
            b"a//b",
            b"a/",
            b"a\0b",
            b"base/5/..",
        ];
        for path in wrong {
            assert!(DataPath::new(path).is_err(), "{path:?}");
        }
        assert!(DataPath::new(vec![b'x'; DATA_PATH_BYTES_MAX]).is_ok());
        let error = DataPath::new(vec![b'x'; DATA_PATH_BYTES_MAX + 1]).unwrap_err();
        assert!(error.to_string().len() < 300);
        assert!(DataPath::new("base").unwrap().join(b"../x").is_err());
    }

    #[test]
    fn escapes_have_one_spelling() {
        for text in ["a\\", "a\\n", "a\\x", "a\\x0", "a\\x0A", "a\\x+1", "\\x2e\\x2e", "a\\x00"] {
            assert!(text.parse::<DataPath>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_path_knows_its_folder_and_its_name() {
        let path = DataPath::new("base/5/16384").unwrap();
        assert_eq!(path.file_name(), b"16384");
        assert_eq!(path.parent().unwrap().to_string(), "base/5");
        assert_eq!(path.components().collect::<Vec<_>>(), [&b"base"[..], b"5", b"16384"]);
        assert_eq!(DataPath::new("PG_VERSION").unwrap().parent(), None);
        assert!(path.is_within(b"base") && path.is_within(b"base/5/16384") && !path.is_within(b"bas"));
        assert_eq!(path.as_path(), Path::new("base/5/16384"));
    }

    proptest! {
        #[test]
        fn text_and_json_round_trip(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(path) = DataPath::new(bytes) {
                prop_assert_eq!(path.to_string().parse(), Ok(path.clone()));
                let json = serde_json::to_string(&path).unwrap();
                prop_assert_eq!(&serde_json::from_str::<DataPath>(&json).unwrap(), &path);
                let joined = path.join(b"x").unwrap();
                prop_assert_eq!(joined.parent(), Some(path));
            }
        }

        #[test]
        fn text_read_is_written_the_same_unless_it_escapes_what_needs_none(text in r"[a-z/.\\x0-9]{0,12}|.*") {
            if let Ok(path) = text.parse::<DataPath>() {
                prop_assert_eq!(path.to_string().parse::<DataPath>(), Ok(path));
            }
        }
    }
}
