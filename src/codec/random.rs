//! Randomness as an argument: the machine's for keys and salts, a seeded one for tests and the format example.
//!
//! Every key, salt and name of the format is drawn through `Random`, so that an example repository can be
//! written byte for byte again. RSA and Ed25519 key pairs are the exception: the library draws those itself.

use std::fmt::{self, Debug};
use std::sync::Mutex;

/// A source of random bytes.
pub trait Random: Send + Sync + Debug {
    /// Overwrites `out` with random bytes.
    fn fill(&self, out: &mut [u8]);
}

/// Draws whole arrays from any source.
pub trait RandomExt: Random {
    /// Returns `N` random bytes.
    fn array<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }
}

impl<R: Random + ?Sized> RandomExt for R {}

/// The operating system's generator.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemRandom;

impl Random for SystemRandom {
    fn fill(&self, out: &mut [u8]) {
        // Going on without randomness would reuse keys: there is nothing to do but stop.
        aws_lc_rs::rand::fill(out).expect("the operating system gives random bytes");
    }
}

/// A generator that gives the same bytes for the same seed on every machine; never for real keys.
pub struct SeededRandom {
    stream: Mutex<blake3::OutputReader>,
}

impl SeededRandom {
    /// Creates the generator at the start of the stream that `seed` names.
    pub fn new(seed: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("walden seeded random");
        hasher.update(&seed.to_le_bytes());
        Self { stream: Mutex::new(hasher.finalize_xof()) }
    }
}

impl Random for SeededRandom {
    fn fill(&self, out: &mut [u8]) {
        self.stream.lock().expect("no holder of this lock panics").fill(out);
    }
}

impl Debug for SeededRandom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SeededRandom")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_stream_however_it_is_cut() {
        let whole: [u8; 100] = SeededRandom::new(7).array();
        let cut = SeededRandom::new(7);
        let (head, tail): ([u8; 33], [u8; 67]) = (cut.array(), cut.array());
        assert_eq!(whole[..33], head);
        assert_eq!(whole[33..], tail);
        assert_ne!(whole, SeededRandom::new(8).array());
    }

    #[test]
    fn the_stream_of_a_seed_is_fixed_for_ever() {
        // The worked example of docs/format.md depends on it.
        let bytes: [u8; 8] = SeededRandom::new(1).array();
        assert_eq!(hex::encode(bytes), "3ca43d96c1087371");
    }

    #[test]
    fn the_system_does_not_repeat_itself() {
        let (a, b): ([u8; 32], [u8; 32]) = (SystemRandom.array(), SystemRandom.array());
        assert_ne!(a, b);
        assert_ne!(a, [0; 32]);
    }
}
