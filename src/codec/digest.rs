//! Digests: BLAKE3 for what Walden names and compares, SHA-256 for what others must be able to compute.
//!
//! A plain digest of plaintext stored in the clear would let a reader of the store test guesses; what is stored
//! over raw content is therefore salted, BLAKE3 keyed with the object's 32-byte salt.

use std::fmt;

use super::hex_bytes::hex_bytes;

hex_bytes!(
    /// A BLAKE3 digest: plain, or salted with 32 bytes.
    Digest,
    32
);

hex_bytes!(
    /// A SHA-256 digest.
    Sha256Digest,
    32
);

impl Digest {
    /// Computes the plain digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Computes the digest of `bytes` that only who knows the salt can test a guess against.
    pub fn salted(salt: &[u8; 32], bytes: &[u8]) -> Self {
        Self(*blake3::keyed_hash(salt, bytes).as_bytes())
    }
}

/// Computes a BLAKE3 digest of bytes that come in pieces.
#[derive(Clone)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// Starts a plain digest.
    pub fn new() -> Self {
        Self(blake3::Hasher::new())
    }

    /// Starts a digest keyed with a salt (or a secret) of 32 bytes.
    pub fn salted(salt: &[u8; 32]) -> Self {
        Self(blake3::Hasher::new_keyed(salt))
    }

    /// Takes in the next bytes.
    pub fn update(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(bytes);
        self
    }

    /// Returns the digest of all bytes taken in.
    pub fn finish(self) -> Digest {
        Digest(*self.0.finalize().as_bytes())
    }
}

impl Default for Hasher {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hasher")
    }
}

/// Computes a SHA-256 digest of bytes that come in pieces.
#[derive(Clone)]
pub struct Sha256(aws_lc_rs::digest::Context);

impl Sha256 {
    /// Starts a digest.
    pub fn new() -> Self {
        Self(aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256))
    }

    /// Computes the digest of `bytes` at once.
    pub fn digest(bytes: &[u8]) -> Sha256Digest {
        let mut hasher = Self::new();
        hasher.update(bytes);
        hasher.finish()
    }

    /// Takes in the next bytes.
    pub fn update(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(bytes);
        self
    }

    /// Returns the digest of all bytes taken in.
    pub fn finish(self) -> Sha256Digest {
        let digest = self.0.finish();
        Sha256Digest(digest.as_ref().try_into().expect("SHA-256 gives 32 bytes"))
    }
}

impl Default for Sha256 {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sha256")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_published_vectors() {
        assert_eq!(
            Sha256::digest(b"abc").to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(
            Digest::of(b"").to_string(),
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
        );
    }

    #[test]
    fn pieces_and_whole_give_the_same_digest() {
        let bytes: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
        let salt = [9; 32];
        let (mut plain, mut salted, mut sha) = (Hasher::new(), Hasher::salted(&salt), Sha256::new());
        for piece in bytes.chunks(777) {
            plain.update(piece);
            salted.update(piece);
            sha.update(piece);
        }
        assert_eq!(plain.finish(), Digest::of(&bytes));
        assert_eq!(salted.finish(), Digest::salted(&salt, &bytes));
        assert_eq!(sha.finish(), Sha256::digest(&bytes));
    }

    #[test]
    fn the_salt_matters() {
        assert_ne!(Digest::salted(&[1; 32], b"x"), Digest::salted(&[2; 32], b"x"));
        assert_ne!(Digest::salted(&[0; 32], b"x"), Digest::of(b"x"));
    }
}
