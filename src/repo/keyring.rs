//! The keys that a host has, and how data keys travel in headers.
//!
//! A data key lives in memory only. What is stored is an envelope: its id, a commitment that tells a wrong key
//! from damage, and one copy wrapped for each recipient. A host without a private key can make envelopes and
//! cannot open any. Readers name the signers they trust; a host that names none accepts unsigned objects.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use lru::LruCache;
use serde::{Deserialize, Serialize};

use crate::codec::{
    self, Cipher, DataKey, DataKeyId, Digest, FrameKey, Random, RecipientId, RecipientKey,
    RecipientPrivateKey, SealObserver, SignerId, SigningKey, VerifyKey,
};
use crate::repo::error::Error;
use crate::repo::id::ClusterId;
use crate::repo::identity::{Identity, ObjectKind};
use crate::repo::text_forms::{base64_bytes, cipher_name, hex_bytes};
use crate::repo::wire::{WireError, WireReader, WireWriter};

/// The keys of this host, as `config` found them.
#[derive(Debug)]
pub struct KeyringOptions {
    /// Who can read basebackups; empty: not encrypted.
    pub recipients: Vec<RecipientKey>,
    /// Who can read WAL; empty: not encrypted.
    pub wal_recipients: Vec<RecipientKey>,
    /// Who vouches for what this host writes.
    pub signer: Option<SigningKey>,
    /// Whose word this host takes; empty: everybody's, with a warning.
    pub trusted_signers: Vec<VerifyKey>,
    /// What opens envelopes on a host that reads.
    pub private_keys: Vec<RecipientPrivateKey>,
    /// Where keys and salts are drawn from.
    pub random: Arc<dyn Random>,
}

/// The keys of this host, ready for use.
#[derive(Debug)]
pub struct Keyring {
    options: KeyringOptions,
    expects_encryption: bool,
    observer: Option<ObserverHandle>,
    /// RSA costs milliseconds, and many objects share a data key.
    opened: Mutex<LruCache<DataKeyId, Arc<DataKey>>>,
}

/// Who is to be able to read what is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// The holders of `recipients`.
    Basebackup,
    /// The holders of `wal_recipients`.
    Wal,
}

/// How an object came to be accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// A trusted signer vouches for it.
    Signed(SignerId),
    /// This host names no trusted signers, and nobody was asked.
    Unverified,
}

/// What a header says of the key an object is sealed with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyEnvelope {
    /// The cipher; with `none` the rest is zero and empty.
    #[serde(with = "cipher_name")]
    pub cipher: Cipher,
    /// The data key's id.
    #[serde(with = "hex_bytes")]
    pub id: [u8; 16],
    /// HKDF of the data key: tells a wrong key from damage.
    #[serde(with = "hex_bytes")]
    pub commitment: [u8; 32],
    /// One copy for each recipient, at most [`RECIPIENTS_MAX`].
    pub wrapped: Vec<WrappedKey>,
}

/// A data key encrypted for one recipient by RSA-OAEP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrappedKey {
    /// SHA-256 of the recipient's SPKI.
    #[serde(with = "hex_bytes")]
    pub recipient: [u8; 32],
    /// The ciphertext, as long as the recipient's modulus.
    #[serde(with = "base64_bytes")]
    pub key: Vec<u8>,
}

/// What frames are sealed and opened with: a data key, or the absence of one.
#[derive(Debug, Clone)]
pub struct ContentKey {
    data_key: Option<Arc<DataKey>>,
}

/// Recipients of one object; more would make every header larger than the data it stands before.
pub const RECIPIENTS_MAX: usize = 32;
/// RSA 16384 is the largest modulus that is wrapped for.
const WRAPPED_BYTES_MAX: usize = 2048;
/// Unwrapped data keys kept: one a basebackup, one a pushed segment.
const OPENED_KEYS_MAX: NonZeroUsize = NonZeroUsize::new(256).expect("256 is not zero");

impl Keyring {
    /// Creates a keyring from the keys that were configured.
    pub fn new(options: KeyringOptions) -> Self {
        let expects_encryption = !options.recipients.is_empty()
            || !options.wal_recipients.is_empty()
            || !options.private_keys.is_empty();
        Self {
            options,
            expects_encryption,
            observer: None,
            opened: Mutex::new(LruCache::new(OPENED_KEYS_MAX)),
        }
    }

    /// Creates a keyring without any key: nothing is encrypted, nothing is signed.
    pub fn unencrypted(random: Arc<dyn Random>) -> Self {
        Self::new(KeyringOptions {
            recipients: Vec::new(),
            wal_recipients: Vec::new(),
            signer: None,
            trusted_signers: Vec::new(),
            private_keys: Vec::new(),
            random,
        })
    }

    /// Refuses what is not encrypted even where no key says that anything is.
    pub fn expecting_encryption(self) -> Self {
        Self { expects_encryption: true, ..self }
    }

    /// Shows everything that is sealed from now on to `observer`, for tests of nonce reuse.
    pub fn observed_by(mut self, observer: Arc<dyn SealObserver>) -> Self {
        self.observer = Some(ObserverHandle(observer));
        self
    }

    /// Returns the source of randomness for ids and salts.
    pub fn random(&self) -> &dyn Random {
        &*self.options.random
    }

    /// Returns whether what this host writes for `audience` is encrypted.
    pub fn encrypts(&self, audience: Audience) -> bool {
        !self.recipients(audience).is_empty()
    }

    /// Returns a digest of cipher and recipients of what this host writes for `audience`: only what was sealed for the
    /// same ones may stand in a basebackup of today.
    pub fn sealing(&self, audience: Audience) -> Digest {
        let mut recipients: Vec<[u8; 32]> = self.recipients(audience).iter().map(|key| key.id().0).collect();
        recipients.sort_unstable();
        let cipher = if recipients.is_empty() { Cipher::None } else { Cipher::Aes256Gcm };
        Digest::of(&[&[cipher as u8][..], recipients.as_flattened()].concat())
    }

    /// Returns whether what this host writes is signed.
    pub fn signs(&self) -> bool {
        self.options.signer.is_some()
    }

    /// Returns whether this host holds a private key.
    pub fn can_read(&self) -> bool {
        !self.options.private_keys.is_empty() || !self.expects_encryption
    }

    /// Draws a new data key and wraps it for everyone in `audience`.
    pub fn create_key(&self, audience: Audience) -> Result<(ContentKey, KeyEnvelope), Error> {
        let recipients = self.recipients(audience);
        if recipients.is_empty() {
            let envelope =
                KeyEnvelope { cipher: Cipher::None, id: [0; 16], commitment: [0; 32], wrapped: Vec::new() };
            return Ok((ContentKey { data_key: None }, envelope));
        }
        let mut data_key = DataKey::generate(self.random());
        if let Some(observer) = &self.observer {
            data_key = data_key.observed_by(observer.0.clone());
        }
        let wrapped = recipients
            .iter()
            .map(|recipient| Ok(WrappedKey { recipient: recipient.id().0, key: recipient.wrap(&data_key)? }))
            .collect::<Result<_, codec::Error>>()?;
        let envelope = KeyEnvelope {
            cipher: Cipher::Aes256Gcm,
            id: data_key.id().0,
            commitment: data_key.commitment(),
            wrapped,
        };
        Ok((ContentKey { data_key: Some(Arc::new(data_key)) }, envelope))
    }

    /// Opens the key that `object` is sealed with.
    ///
    /// # Errors
    /// `NoPrivateKey` where none of the recipients' keys is here, `WrongKey` where the unwrapped key is not the
    /// committed one, `Unencrypted` where the object is not encrypted and this host expects encryption.
    pub fn open_key(&self, envelope: &KeyEnvelope, object: &str) -> Result<ContentKey, Error> {
        if envelope.cipher == Cipher::None {
            if self.expects_encryption {
                return Err(Error::Unencrypted { object: object.to_owned() });
            }
            return Ok(ContentKey { data_key: None });
        }
        let id = DataKeyId(envelope.id);
        if let Some(key) = self.opened.lock().expect("no holder of this lock panics").get(&id)
            && key.commitment() == envelope.commitment
        {
            return Ok(ContentKey { data_key: Some(key.clone()) });
        }
        let wrong_key = || Error::WrongKey { object: object.to_owned() };
        let (private_key, wrapped) = self.matching_private_key(envelope).ok_or_else(|| {
            Error::NoPrivateKey { object: object.to_owned(), recipients: describe_recipients(envelope) }
        })?;
        let secret = private_key.unwrap(&wrapped.key).map_err(|_| wrong_key())?;
        let key = DataKey::from_secret(id, *secret, &envelope.commitment).map_err(|_| wrong_key())?;
        let key = Arc::new(key);
        self.opened.lock().expect("no holder of this lock panics").put(id, key.clone());
        Ok(ContentKey { data_key: Some(key) })
    }

    /// Signs `payload` as the object of `identity`; nothing where this host has no signing key.
    pub fn sign(&self, identity: &Identity, payload: &[u8]) -> Option<(SignerId, [u8; 64])> {
        let signer = self.options.signer.as_ref()?;
        Some((signer.signer_id(), signer.sign(&signed_bytes(identity, payload))))
    }

    /// Decides whether `payload` is accepted as the object of `identity`.
    pub fn verify(
        &self,
        identity: &Identity,
        payload: &[u8],
        signature: Option<&(SignerId, [u8; 64])>,
        object: &str,
    ) -> Result<Trust, Error> {
        if self.options.trusted_signers.is_empty() {
            return Ok(Trust::Unverified);
        }
        let (signer, signature) = signature.ok_or_else(|| Error::untrusted(object, "it is not signed"))?;
        let key =
            self.options.trusted_signers.iter().find(|key| key.signer_id() == *signer).ok_or_else(|| {
                Error::untrusted(object, format!("its signer {signer} is not among trusted_signers"))
            })?;
        key.verify(&signed_bytes(identity, payload), signature)
            .map_err(|_| Error::untrusted(object, "its signature does not verify"))?;
        Ok(Trust::Signed(*signer))
    }

    /// Checks that `reader` accepts what this host signs.
    pub fn check_signer(&self, reader: &Self) -> Result<(), Error> {
        let identity = Identity {
            kind: ObjectKind::Begin,
            site: uuid::Uuid::nil(),
            cluster: ClusterId::UNKNOWN,
            timeline: None,
            name: String::new(),
            part: String::new(),
        };
        let payload = b"a trial";
        let signature = self.sign(&identity, payload);
        reader.verify(&identity, payload, signature.as_ref(), "what this host writes").map(drop)
    }

    fn recipients(&self, audience: Audience) -> &[RecipientKey] {
        match audience {
            Audience::Basebackup => &self.options.recipients,
            Audience::Wal => &self.options.wal_recipients,
        }
    }

    fn matching_private_key<'a>(
        &'a self,
        envelope: &'a KeyEnvelope,
    ) -> Option<(&'a RecipientPrivateKey, &'a WrappedKey)> {
        self.options.private_keys.iter().find_map(|key| {
            let id = key.recipient_id().0;
            Some((key, envelope.wrapped.iter().find(|wrapped| wrapped.recipient == id)?))
        })
    }
}

impl ContentKey {
    /// Returns the cipher that frames under this key have.
    pub fn cipher(&self) -> Cipher {
        if self.data_key.is_some() { Cipher::Aes256Gcm } else { Cipher::None }
    }

    /// Derives the key of one object, which is one sealing of one identity.
    pub fn frame_key(&self, salt: &[u8; 32], identity: &Identity) -> FrameKey {
        let identity = identity.encode();
        match &self.data_key {
            Some(key) => key.frame_key(salt, &identity),
            None => FrameKey::unencrypted(salt, &identity),
        }
    }
}

impl KeyEnvelope {
    /// Appends the envelope in its binary form.
    pub fn encode(&self, out: &mut WireWriter) {
        out.u8(self.cipher as u8).raw(&self.id).raw(&self.commitment).varint(self.wrapped.len() as u64);
        for wrapped in &self.wrapped {
            out.raw(&wrapped.recipient).bytes(&wrapped.key);
        }
    }

    /// Takes an envelope in its binary form.
    pub fn decode(reader: &mut WireReader<'_>) -> Result<Self, WireError> {
        let cipher = Cipher::try_from(reader.u8()?).map_err(|_| WireError::Invalid { field: "cipher" })?;
        let (id, commitment) = (reader.array()?, reader.array()?);
        // At most RECIPIENTS_MAX, so room for all of them is little whatever follows.
        let count = reader.bounded("recipient count", RECIPIENTS_MAX as u64)? as usize;
        let mut wrapped = Vec::with_capacity(count);
        for _ in 0..count {
            let recipient = reader.array()?;
            let key = reader.bytes()?;
            if key.len() > WRAPPED_BYTES_MAX {
                return Err(WireError::Invalid { field: "wrapped key" });
            }
            wrapped.push(WrappedKey { recipient, key: key.to_vec() });
        }
        Ok(Self { cipher, id, commitment, wrapped })
    }
}

fn signed_bytes(identity: &Identity, payload: &[u8]) -> Vec<u8> {
    let mut bytes = identity.encode();
    bytes.extend_from_slice(payload);
    bytes
}

fn describe_recipients(envelope: &KeyEnvelope) -> String {
    let ids: Vec<String> = envelope
        .wrapped
        .iter()
        .map(|wrapped| RecipientId(wrapped.recipient).to_string()[..16].to_owned())
        .collect();
    if ids.is_empty() { "nobody".to_owned() } else { format!("recipient {}", ids.join(", ")) }
}

#[derive(Clone)]
struct ObserverHandle(Arc<dyn SealObserver>);

impl std::fmt::Debug for ObserverHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealObserver")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn envelope() -> impl Strategy<Value = KeyEnvelope> {
        let wrapped = (any::<[u8; 32]>(), prop::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(recipient, key)| WrappedKey { recipient, key });
        let cipher = prop_oneof![Just(Cipher::None), Just(Cipher::Aes256Gcm)];
        (cipher, any::<[u8; 16]>(), any::<[u8; 32]>(), prop::collection::vec(wrapped, 0..5))
            .prop_map(|(cipher, id, commitment, wrapped)| KeyEnvelope { cipher, id, commitment, wrapped })
    }

    fn encoded(envelope: &KeyEnvelope) -> Vec<u8> {
        let mut out = WireWriter::new();
        envelope.encode(&mut out);
        out.finish()
    }

    #[test]
    fn more_recipients_and_longer_keys_than_there_can_be_are_refused() {
        let envelope = |count: usize, len: usize| KeyEnvelope {
            cipher: Cipher::Aes256Gcm,
            id: [0; 16],
            commitment: [0; 32],
            wrapped: vec![WrappedKey { recipient: [0; 32], key: vec![0; len] }; count],
        };
        let decode = |envelope: KeyEnvelope| KeyEnvelope::decode(&mut WireReader::new(&encoded(&envelope)));
        assert!(decode(envelope(RECIPIENTS_MAX, WRAPPED_BYTES_MAX)).is_ok());
        assert!(decode(envelope(RECIPIENTS_MAX + 1, 1)).is_err());
        assert!(decode(envelope(1, WRAPPED_BYTES_MAX + 1)).is_err());
    }

    proptest! {
        #[test]
        fn an_envelope_comes_back_and_a_damaged_one_is_read_or_refused(
            envelope in envelope(), at: usize, flip in 1u8.., cut: usize,
        ) {
            let mut bytes = encoded(&envelope);
            prop_assert_eq!(KeyEnvelope::decode(&mut WireReader::new(&bytes)), Ok(envelope));
            let at = at % bytes.len();
            bytes[at] ^= flip;
            let _ = KeyEnvelope::decode(&mut WireReader::new(&bytes));
            bytes.truncate(cut % bytes.len());
            let _ = KeyEnvelope::decode(&mut WireReader::new(&bytes));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = KeyEnvelope::decode(&mut WireReader::new(&bytes));
        }
    }
}
