//! CRC-32C, the checksum of WAL, `pg_control`, `pg_filenode.map` and of files in a `backup_manifest`.
//!
//! Parts of a file can be summed up by different threads and joined: that is what `then` is for. It finds accidents,
//! not intent: what must withstand a hostile store is sealed by `codec`.

use crc_fast::CrcAlgorithm::Crc32Iscsi;
use crc_fast::{Digest, checksum, checksum_combine};

/// The CRC-32C of some bytes; by default that of none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Crc32c(pub u32);

/// A CRC-32C over bytes that come in pieces.
#[derive(Debug, Clone)]
pub struct Crc32cDigest(Digest);

impl Crc32c {
    /// Computes it.
    pub fn of(bytes: &[u8]) -> Self {
        Self(checksum(Crc32Iscsi, bytes) as u32)
    }

    /// Returns that of our bytes followed by the `len` bytes of `next`.
    pub fn then(self, next: Self, len: u64) -> Self {
        Self(checksum_combine(Crc32Iscsi, u64::from(self.0), u64::from(next.0), len) as u32)
    }

    /// Returns it as a `backup_manifest` writes it: the four bytes as they lie in the server's memory, in
    /// hexadecimal.
    pub fn manifest_hex(self) -> String {
        hex::encode(self.0.to_le_bytes())
    }
}

impl Crc32cDigest {
    /// Starts over no bytes.
    pub fn new() -> Self {
        Self(Digest::new(Crc32Iscsi))
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Returns the sum of all bytes added.
    pub fn finish(self) -> Crc32c {
        // The library returns every width in 64 bits.
        Crc32c(self.0.finalize() as u32)
    }
}

impl Default for Crc32cDigest {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_is_the_checksum_of_rfc_3720() {
        assert_eq!(Crc32c::of(b"123456789"), Crc32c(0xe306_9283));
        assert_eq!(Crc32c::of(b""), Crc32c::default());
        assert_eq!(Crc32c::of(&[0; 32]), Crc32c(0x8a91_36aa));
    }

    /// The file PG_VERSION in a manifest of PostgreSQL 15.
    #[test]
    fn a_manifest_shows_the_bytes_as_they_lie_in_memory() {
        assert_eq!(Crc32c::of(b"15\n").manifest_hex(), "8a744722");
    }

    proptest! {
        #[test]
        fn pieces_make_the_whole(a: Vec<u8>, b: Vec<u8>) {
            let mut digest = Crc32cDigest::new();
            digest.update(&a);
            digest.update(&b);
            prop_assert_eq!(digest.finish(), Crc32c::of(&[a, b].concat()));
        }

        #[test]
        fn parts_join(a: Vec<u8>, b: Vec<u8>) {
            let joined = Crc32c::of(&a).then(Crc32c::of(&b), b.len() as u64);
            prop_assert_eq!(joined, Crc32c::of(&[a, b].concat()));
        }
    }
}
