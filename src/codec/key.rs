//! The data key: 32 random bytes in memory, from which every object's own key is derived.
//!
//! data key --HKDF-SHA256(salt of the object, identity of the object)--> frame key. A commitment stored beside
//! the wrapped copies tells a wrong key from damaged data. The secret is never printed, serialized or written;
//! it is erased when dropped. Deliberately absent: what an identity contains (`repo` says).

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::{constant_time, hkdf};
use zeroize::Zeroizing;

use super::error::{Error, Result};
use super::frame::{FrameKey, SealObserver};
use super::hex_bytes::hex_bytes;
use super::random::{Random, RandomExt};

const COMMITMENT_INFO: &[u8] = b"walden/1 commit";

hex_bytes!(
    /// The public name of a data key, random and unrelated to its secret.
    DataKeyId,
    16
);

/// A data key: its name and its secret.
#[derive(Clone)]
pub struct DataKey {
    id: DataKeyId,
    secret: Zeroizing<[u8; 32]>,
    observer: Option<Arc<dyn SealObserver>>,
}

impl DataKey {
    /// Draws a new data key and its name.
    pub fn generate(random: &dyn Random) -> Self {
        let id = DataKeyId(random.array());
        Self { id, secret: Zeroizing::new(random.array()), observer: None }
    }

    /// Takes up an unwrapped secret, refusing one that is not what the commitment names.
    pub fn from_secret(
        id: DataKeyId,
        secret: impl Into<Zeroizing<[u8; 32]>>,
        commitment: &[u8; 32],
    ) -> Result<Self, Error> {
        let key = Self { id, secret: secret.into(), observer: None };
        constant_time::verify_slices_are_equal(&key.commitment(), commitment)
            .map_err(|_| Error::WrongKey { id })?;
        Ok(key)
    }

    /// Returns the name.
    pub fn id(&self) -> DataKeyId {
        self.id
    }

    /// Returns what may be published to recognize the secret: HKDF-SHA256 without salt, info `walden/1 commit`.
    pub fn commitment(&self) -> [u8; 32] {
        *hkdf_sha256(&[], &*self.secret, COMMITMENT_INFO)
    }

    /// Derives the key of the one object that has this salt and identity: HKDF-SHA256, info = identity.
    pub fn frame_key(&self, salt: &[u8; 32], identity: &[u8]) -> FrameKey {
        let key = hkdf_sha256(salt, &*self.secret, identity);
        FrameKey::aes_256_gcm(&key, self.observer.clone())
    }

    /// Tells `observer` of everything sealed under this key from now on.
    pub fn observed_by(self, observer: Arc<dyn SealObserver>) -> Self {
        Self { observer: Some(observer), ..self }
    }

    pub(super) fn secret(&self) -> &[u8; 32] {
        &self.secret
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Derives 32 bytes with HKDF-SHA256 (RFC 5869).
pub(super) fn hkdf_sha256(salt: &[u8], secret: &[u8], info: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut key = Zeroizing::new([0; 32]);
    hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(secret)
        .expand(&[info], hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut *key))
        .expect("HKDF-SHA256 gives 32 bytes for any input");
    key
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{CodecId, ErrorKind, FrameAad, SeededRandom};

    const FRAME: FrameAad = FrameAad { kind: 1, position: 0, last: true, codec: CodecId::None, raw_len: 4 };

    fn key(seed: u64) -> DataKey {
        DataKey::generate(&SeededRandom::new(seed))
    }

    /// RFC 5869, appendix A, the cases with SHA-256; we derive the first 32 of their bytes.
    #[test]
    fn derivation_is_hkdf_of_rfc_5869() {
        let bytes = |range: std::ops::RangeInclusive<u8>| range.collect::<Vec<u8>>();
        let cases = [
            (
                bytes(0x00..=0x0c),
                vec![0x0b; 22],
                bytes(0xf0..=0xf9),
                "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
            ),
            (
                bytes(0x60..=0xaf),
                bytes(0x00..=0x4f),
                bytes(0xb0..=0xff),
                "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c",
            ),
            (
                vec![],
                vec![0x0b; 22],
                vec![],
                "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d",
            ),
        ];
        for (salt, secret, info, expected) in cases {
            assert_eq!(hex::encode(*hkdf_sha256(&salt, &secret, &info)), expected);
        }
    }

    #[test]
    fn a_wrong_secret_is_a_wrong_key_and_not_damage() {
        let key = key(1);
        let taken_up = DataKey::from_secret(key.id(), *key.secret(), &key.commitment()).unwrap();
        assert_eq!(taken_up.commitment(), key.commitment());
        assert_eq!(taken_up.id(), key.id());

        let mut secret = *key.secret();
        secret[31] ^= 1;
        let error = DataKey::from_secret(key.id(), secret, &key.commitment()).unwrap_err();
        assert_eq!(error, Error::WrongKey { id: key.id() });
        assert_eq!(error.kind(), ErrorKind::WrongKey);
        let message = format!("{error}. {}", error.hint().unwrap());
        assert!(message.contains("wrong key") && !message.contains("damage"), "{message}");
    }

    #[test]
    fn salt_identity_and_data_key_each_give_another_frame_key() {
        let (key, other) = (key(1), key(2));
        let sealed = key.frame_key(&[1; 32], b"identity").seal(&FRAME, b"body".to_vec());
        assert_eq!(key.frame_key(&[1; 32], b"identity").open(&FRAME, sealed.clone()).unwrap(), b"body");
        for wrong in [
            key.frame_key(&[2; 32], b"identity"),
            key.frame_key(&[1; 32], b"identitY"),
            key.frame_key(&[1; 32], b""),
            other.frame_key(&[1; 32], b"identity"),
        ] {
            assert!(wrong.open(&FRAME, sealed.clone()).is_err());
        }
    }

    #[test]
    fn the_secret_does_not_show() {
        let key = key(1);
        let shown = format!("{key:?} {:?}", key.frame_key(&[0; 32], b"identity"));
        let secret = hex::encode(key.secret());
        assert!(!shown.contains(&secret[..8]) && !shown.contains(&format!("{}", key.secret()[0])), "{shown}");
        assert!(shown.contains(&key.id().to_string()));
    }
}
