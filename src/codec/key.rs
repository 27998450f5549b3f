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
        constant_time::verify_slices_are_equal(&key.commitment(), commitment).map_err(|_| Error::WrongKey { id })?;
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
