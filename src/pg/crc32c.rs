//! CRC-32C, the checksum of WAL, `pg_control`, `pg_filenode.map` and of files in a `backup_manifest`.
//!
//! Parts of a file can be summed up by different threads and joined: that is what `then` is for.

use crc_fast::CrcAlgorithm::Crc32Iscsi;
use crc_fast::{checksum, checksum_combine};

/// The CRC-32C of some bytes; by default that of none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Crc32c(pub u32);

impl Crc32c {
    /// Computes it.
    pub fn of(bytes: &[u8]) -> Self {
        Self(checksum(Crc32Iscsi, bytes) as u32)
    }

    /// Returns that of our bytes followed by the `len` bytes of `next`.
    pub fn then(self, next: Self, len: u64) -> Self {
        Self(checksum_combine(Crc32Iscsi, u64::from(self.0), u64::from(next.0), len) as u32)
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

    proptest! {
        #[test]
        fn parts_join(a: Vec<u8>, b: Vec<u8>) {
            let joined = Crc32c::of(&a).then(Crc32c::of(&b), b.len() as u64);
            prop_assert_eq!(joined, Crc32c::of(&[a, b].concat()));
        }
    }
}
