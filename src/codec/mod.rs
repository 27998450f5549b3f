//! Bytes to bytes: compression, frames, keys, signatures, digests, and the bounded pool that does such work.
//!
//! The pipeline of a chunk: `Compressor` → `FrameKey::seal` on the way out, `FrameKey::open` → `Decompressor` on
//! the way in. `DataKey` derives the frame keys and lives in memory only; `RecipientKey` wraps it for those who
//! may read; `SigningKey` says who wrote. The exact bytes are in `docs/format.md`.
//!
//! Invariants: decoders never panic and never produce more than the caller's bound; a wrong key is told apart
//! from damaged bytes; compressors and ciphers are named nowhere else (`docs/decisions/0001-crypto-crates.md`).
//! Deliberately absent: what an object is, where it is stored and what its identity says; `repo` knows.

mod compress;
#[cfg(test)]
mod cross_check;
mod digest;
mod error;
mod frame;
mod hex_bytes;
mod key;
mod key_pair;
mod pem_file;
mod pool;
mod random;
mod recipient;
mod seal_recorder;
mod signer;

pub use compress::{CodecId, Compression, Compressor, Decompressor};
pub use digest::{Digest, Hasher, Sha256, Sha256Digest};
pub use error::{Error, ErrorKind, Result};
pub use frame::{Cipher, FrameAad, FrameKey, NONCE_LEN, SealObserver, TAG_LEN};
pub use hex_bytes::ParseHexError;
pub use key::{DataKey, DataKeyId};
pub use key_pair::{NewKeys, create_keys};
pub use pool::CpuPool;
pub use random::{Random, RandomExt, SeededRandom, SystemRandom};
pub use recipient::{RSA_BITS_MIN, RecipientId, RecipientKey, RecipientPrivateKey};
pub use seal_recorder::{ReusedNonce, SealRecorder};
pub use signer::{SIGNATURE_LEN, SignerId, SigningKey, VerifyKey};
