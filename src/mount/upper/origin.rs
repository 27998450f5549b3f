//! Where in the lower something in the upper came from, as it is written into its extended attribute.
//!
//! `1 <base length> <path in the lower>`: the version, how many bytes from the start are the lower's where the file
//! has holes, and the path. The base length only ever falls, and it is on stable storage before the file is cut: the
//! other order could bring the lower's pages back after a crash. Something without the attribute was made here.

use std::io;

/// No path is longer: with its length before it, it must fit one block of attributes on ext4.
pub(crate) const PATH_BYTES_MAX: usize = 3500;

/// No file of a lower is longer: a map of one that were would be asked for by a number alone.
pub(crate) const BASE_LENGTH_MAX: u64 = 64 << 40;

/// Where in the lower something came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) base_length: u64,
    pub(crate) path: Vec<u8>,
}

impl Origin {
    /// Returns the attribute's value.
    pub(crate) fn to_bytes(&self) -> io::Result<Vec<u8>> {
        if self.path.len() > PATH_BYTES_MAX {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        }
        let mut bytes = format!("1 {} ", self.base_length).into_bytes();
        bytes.extend_from_slice(&self.path);
        Ok(bytes)
    }

    /// Reads an attribute's value; anything but what `to_bytes` writes is an error.
    pub(crate) fn from_bytes(bytes: &[u8]) -> io::Result<Self> {
        let mut parts = bytes.splitn(3, |byte| *byte == b' ');
        let (version, length, path) = (parts.next(), parts.next(), parts.next());
        let length =
            length.and_then(|digits| std::str::from_utf8(digits).ok()).and_then(|text| text.parse().ok());
        match (version, length, path) {
            (Some(b"1"), Some(base_length), Some(path)) if base_length <= BASE_LENGTH_MAX => {
                Ok(Self { base_length, path: path.to_vec() })
            }
            _ => Err(io::Error::other(format!("origin {:?} is malformed", String::from_utf8_lossy(bytes)))),
        }
    }
}

/// Returns the path of a name in a directory of the lower; the top directory's path is empty.
pub(crate) fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_is_read_as_it_was_written() {
        for path in [&b""[..], b"base/1/16384", b"odd name\n\xff with  spaces"] {
            let origin = Origin { base_length: BASE_LENGTH_MAX, path: path.to_vec() };
            assert_eq!(Origin::from_bytes(&origin.to_bytes().unwrap()).unwrap(), origin);
        }
    }

    #[test]
    fn anything_else_is_an_error() {
        for bytes in [
            &b""[..],
            b"1",
            b"1 8192",
            b"2 8192 x",
            b"1 -1 x",
            b"1 18446744073709551615 x",
            b"1 x y",
            b"\xff\xff",
        ] {
            assert!(Origin::from_bytes(bytes).is_err(), "{bytes:?}");
        }
        let long = Origin { base_length: 0, path: vec![b'a'; PATH_BYTES_MAX + 1] };
        assert_eq!(long.to_bytes().unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
    }

    proptest! {
        #[test]
        fn what_is_read_is_in_bounds_and_would_be_written_so(bytes: Vec<u8>, length in ".{0,22}", path: Vec<u8>) {
            let made = [b"1 ", length.as_bytes(), b" ", &path].concat();
            for bytes in [bytes, made] {
                if let Ok(origin) = Origin::from_bytes(&bytes) {
                    prop_assert!(origin.base_length <= BASE_LENGTH_MAX);
                    let written = Origin::from_bytes(&origin.to_bytes().unwrap()).unwrap();
                    prop_assert_eq!(written, origin);
                }
            }
        }
    }
}
