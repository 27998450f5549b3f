//! A frame: the unit of sealing. Body in, body and 16 bytes of tag out, in the same buffer.
//!
//! AES-256-GCM: nonce = position as 96 bits big-endian, additional data = the 15 bytes of `FrameAad`. Every
//! object has its own key (its own salt), so a position is a nonce used once. Without encryption the tag is 16
//! bytes of BLAKE3 keyed by derive_key("walden/1 frame", identity ‖ salt) over the additional data and the body:
//! it finds damage and exchange, and keeps nothing secret. A frame that was altered, cut, moved to another
//! position, object or kind, or made the last one, does not open.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

use super::compress::CodecId;
use super::digest::Sha256;
use super::error::{Error, Result};

/// The length of the tag behind every body.
pub const TAG_LEN: usize = 16;

/// The length of a nonce.
pub const NONCE_LEN: usize = 12;

/// The length of the additional data.
const AAD_LEN: usize = 15;

const UNENCRYPTED_CONTEXT: &str = "walden/1 frame";

/// How frames are sealed, as recorded in an object's header; a closed list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Cipher {
    None = 0,
    Aes256Gcm = 1,
}

impl TryFrom<u8> for Cipher {
    type Error = Error;

    fn try_from(byte: u8) -> Result<Self> {
        match byte {
            0 => Ok(Self::None),
            1 => Ok(Self::Aes256Gcm),
            other => Err(Error::UnknownCipher(other)),
        }
    }
}

/// What a frame is beside its body: authenticated, not stored in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameAad {
    /// The kind of thing in the frame; `repo` gives the numbers.
    pub kind: u8,
    /// The frame's number within its object, from 0; never twice under one frame key.
    pub position: u64,
    /// Whether the object ends with this frame.
    pub last: bool,
    /// How the body is compressed.
    pub codec: CodecId,
    /// The length of the body once inflated.
    pub raw_len: u32,
}

impl FrameAad {
    /// Encodes kind u8, position u64, last u8 (0 or 1), codec u8, raw length u32; little-endian, 15 bytes.
    fn encode(&self) -> [u8; AAD_LEN] {
        let mut bytes = [0; AAD_LEN];
        bytes[0] = self.kind;
        bytes[1..9].copy_from_slice(&self.position.to_le_bytes());
        bytes[9] = u8::from(self.last);
        bytes[10] = self.codec as u8;
        bytes[11..15].copy_from_slice(&self.raw_len.to_le_bytes());
        bytes
    }

    fn nonce(&self) -> [u8; NONCE_LEN] {
        let mut bytes = [0; NONCE_LEN];
        bytes[4..].copy_from_slice(&self.position.to_be_bytes());
        bytes
    }

    fn not_authentic(&self) -> Error {
        Error::NotAuthentic { frame: *self }
    }
}

/// A witness of every sealing, for the test that no key and nonce ever carry two plaintexts.
pub trait SealObserver: Send + Sync {
    /// Hears of one frame about to be sealed; the fingerprint is the SHA-256 of the frame key.
    fn sealed(&self, key_fingerprint: [u8; 32], nonce: [u8; NONCE_LEN], plaintext: &[u8], aad: &[u8]);
}

/// The key of one object's frames; clones share it.
#[derive(Clone)]
pub struct FrameKey {
    key: Arc<Key>,
}

enum Key {
    Unencrypted(Zeroizing<[u8; 32]>),
    Aes256Gcm { key: LessSafeKey, observer: Option<Observer> },
}

struct Observer {
    fingerprint: [u8; 32],
    observer: Arc<dyn SealObserver>,
}

impl FrameKey {
    /// Derives the key that binds the frames of an object in a repository without encryption.
    pub fn unencrypted(salt: &[u8; 32], identity: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(UNENCRYPTED_CONTEXT);
        hasher.update(identity).update(salt);
        Self { key: Arc::new(Key::Unencrypted(Zeroizing::new(*hasher.finalize().as_bytes()))) }
    }

    pub(super) fn aes_256_gcm(key: &[u8; 32], observer: Option<Arc<dyn SealObserver>>) -> Self {
        let observer = observer.map(|observer| Observer { fingerprint: Sha256::digest(key).0, observer });
        let key = UnboundKey::new(&AES_256_GCM, key).expect("32 bytes are an AES-256 key");
        Self { key: Arc::new(Key::Aes256Gcm { key: LessSafeKey::new(key), observer }) }
    }

    /// Returns the cipher to record in the object's header.
    pub fn cipher(&self) -> Cipher {
        match *self.key {
            Key::Unencrypted(_) => Cipher::None,
            Key::Aes256Gcm { .. } => Cipher::Aes256Gcm,
        }
    }

    /// Seals `body` in place and appends the tag.
    pub fn seal(&self, frame: &FrameAad, mut body: Vec<u8>) -> Vec<u8> {
        let aad = frame.encode();
        body.reserve_exact(TAG_LEN);
        match &*self.key {
            Key::Unencrypted(key) => {
                let tag = unencrypted_tag(key, &aad, &body);
                body.extend_from_slice(&tag);
            }
            Key::Aes256Gcm { key, observer } => {
                let nonce = frame.nonce();
                if let Some(Observer { fingerprint, observer }) = observer {
                    observer.sealed(*fingerprint, nonce, &body, &aad);
                }
                key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), &mut body)
                    .expect("a frame is far below the 64 GiB that AES-GCM can seal");
            }
        }
        body
    }

    /// Opens what `seal` gave for the same frame, in place.
    pub fn open(&self, frame: &FrameAad, mut stored: Vec<u8>) -> Result<Vec<u8>, Error> {
        let body_len = stored.len().checked_sub(TAG_LEN).ok_or_else(|| frame.not_authentic())?;
        let aad = frame.encode();
        match &*self.key {
            Key::Unencrypted(key) => {
                let (body, tag) = stored.split_at(body_len);
                if unencrypted_tag(key, &aad, body) != *tag {
                    return Err(frame.not_authentic());
                }
            }
            Key::Aes256Gcm { key, .. } => {
                let nonce = Nonce::assume_unique_for_key(frame.nonce());
                key.open_in_place(nonce, Aad::from(aad), &mut stored).map_err(|_| frame.not_authentic())?;
            }
        }
        stored.truncate(body_len);
        Ok(stored)
    }
}

impl fmt::Debug for FrameKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameKey").field("cipher", &self.cipher()).finish_non_exhaustive()
    }
}

fn unencrypted_tag(key: &[u8; 32], aad: &[u8; AAD_LEN], body: &[u8]) -> [u8; TAG_LEN] {
    let mut tag = [0; TAG_LEN];
    blake3::Hasher::new_keyed(key).update(aad).update(body).finalize_xof().fill(&mut tag);
    tag
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::{DataKey, ErrorKind, SeededRandom};

    const FRAME: FrameAad = FrameAad {
        kind: 3,
        position: 0x0102_0304_0506_0708,
        last: false,
        codec: CodecId::Zstd,
        raw_len: 65_536,
    };

    /// The frame keys of one object, with and without encryption.
    fn both_keys() -> [FrameKey; 2] {
        let (salt, identity) = ([7; 32], b"object");
        [
            DataKey::generate(&SeededRandom::new(1)).frame_key(&salt, identity),
            FrameKey::unencrypted(&salt, identity),
        ]
    }

    fn assert_refused(key: &FrameKey, frame: &FrameAad, stored: Vec<u8>) {
        let error = key.open(frame, stored).expect_err("a wrong frame was opened");
        assert_eq!(error, Error::NotAuthentic { frame: *frame });
        assert_eq!(error.kind(), ErrorKind::Damaged);
    }

    #[test]
    fn a_sealed_body_comes_back() {
        for key in both_keys() {
            for body in [vec![], b"x".to_vec(), vec![9; 70_000]] {
                let sealed = key.seal(&FRAME, body.clone());
                assert_eq!(sealed.len(), body.len() + TAG_LEN);
                assert_eq!(key.open(&FRAME, sealed).unwrap(), body);
            }
        }
    }

    #[test]
    fn only_encryption_hides_the_body() {
        let body = b"the quick brown fox jumps over the lazy dog".to_vec();
        let [encrypted, unencrypted] = both_keys().map(|key| (key.cipher(), key.seal(&FRAME, body.clone())));
        assert_eq!(encrypted.0, Cipher::Aes256Gcm);
        assert!(!encrypted.1.windows(4).any(|window| body.windows(4).any(|clear| clear == window)));
        assert_eq!(unencrypted.0, Cipher::None);
        assert!(unencrypted.1.starts_with(&body));
    }

    #[test]
    fn additional_data_and_nonce_are_encoded_as_the_format_says() {
        assert_eq!(hex::encode(FRAME.encode()), "03080706050403020100010000".to_owned() + "0100");
        assert_eq!(hex::encode(FrameAad { last: true, ..FRAME }.encode()), "030807060504030201010100000100");
        assert_eq!(hex::encode(FRAME.nonce()), "000000000102030405060708");
    }

    #[test]
    fn every_field_of_the_frame_is_bound() {
        for key in both_keys() {
            let sealed = key.seal(&FRAME, b"body".to_vec());
            for wrong in [
                FrameAad { kind: 4, ..FRAME },
                FrameAad { position: FRAME.position + 1, ..FRAME },
                FrameAad { position: 0, ..FRAME },
                FrameAad { last: true, ..FRAME },
                FrameAad { codec: CodecId::None, ..FRAME },
                FrameAad { raw_len: 65_535, ..FRAME },
            ] {
                assert_refused(&key, &wrong, sealed.clone());
            }
            assert!(key.open(&FRAME, sealed).is_ok());
        }
    }

    #[test]
    fn frames_exchanged_within_an_object_or_between_objects_do_not_open() {
        let second = FrameAad { position: FRAME.position + 1, ..FRAME };
        for key in both_keys() {
            let (a, b) = (key.seal(&FRAME, b"one".to_vec()), key.seal(&second, b"two".to_vec()));
            assert_refused(&key, &FRAME, b);
            assert_refused(&key, &second, a);
        }
        let sealed = FrameKey::unencrypted(&[7; 32], b"object").seal(&FRAME, b"one".to_vec());
        assert_refused(&FrameKey::unencrypted(&[8; 32], b"object"), &FRAME, sealed.clone());
        assert_refused(&FrameKey::unencrypted(&[7; 32], b"0bject"), &FRAME, sealed);
        let [encrypted, unencrypted] = both_keys();
        assert_refused(&encrypted, &FRAME, unencrypted.seal(&FRAME, b"one".to_vec()));
        assert_refused(&unencrypted, &FRAME, encrypted.seal(&FRAME, b"one".to_vec()));
    }

    #[test]
    fn a_cut_or_lengthened_frame_does_not_open() {
        for key in both_keys() {
            let sealed = key.seal(&FRAME, vec![5; 100]);
            for len in 0..sealed.len() {
                assert_refused(&key, &FRAME, sealed[..len].to_vec());
                assert_refused(&key, &FRAME, sealed[sealed.len() - len..].to_vec());
            }
            assert_refused(&key, &FRAME, [&sealed[..], &[0]].concat());
        }
    }

    #[test]
    fn the_list_of_ciphers_is_closed() {
        for byte in 0..=u8::MAX {
            match Cipher::try_from(byte) {
                Ok(cipher) => assert_eq!(cipher as u8, byte),
                Err(error) => assert_eq!(error, Error::UnknownCipher(byte)),
            }
        }
        assert!(Cipher::try_from(1).is_ok() && Cipher::try_from(2).is_err());
    }

    /// Pins the bytes: a change here is a change of the format.
    #[test]
    fn sealed_bytes_are_those_of_format_1() {
        let [encrypted, unencrypted] =
            both_keys().map(|key| hex::encode(key.seal(&FRAME, b"walden".to_vec())));
        assert_eq!(encrypted, "9c00e009037ff0844a57babd186052e0ee12955e374b");
        assert_eq!(unencrypted, "77616c64656e4bdbfa65367ba60154769e4459bb94a4");
    }

    proptest! {
        #[test]
        fn no_flipped_bit_opens(
            encrypted: bool, body in prop::collection::vec(any::<u8>(), 0..300), at: prop::sample::Index, bit in 0..8
        ) {
            let key = &both_keys()[usize::from(encrypted)];
            let mut sealed = key.seal(&FRAME, body);
            let at = at.index(sealed.len());
            sealed[at] ^= 1_u8 << bit;
            prop_assert!(key.open(&FRAME, sealed).is_err());
        }

        #[test]
        fn arbitrary_bytes_do_not_open(encrypted: bool, stored in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(both_keys()[usize::from(encrypted)].open(&FRAME, stored).is_err());
        }
    }
}
