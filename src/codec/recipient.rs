//! Recipients: who may read. An RSA public key wraps a data key, its private key unwraps it.
//!
//! RSA-OAEP with SHA-256 for hash and MGF1 and an empty label; a recipient is named by the SHA-256 of its SPKI
//! DER, so `openssl pkey -pubin -outform DER | sha256sum` tells the name. Keys below 3072 bits are refused.
//! Deliberately absent: rotation and revocation (`key rewrap`), and passphrases: a file's mode protects it.

use std::fmt;

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::error::KeyRejected;
use aws_lc_rs::rsa::{
    KeyPair, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, OaepPublicEncryptingKey, PrivateDecryptingKey,
    PublicEncryptingKey,
};
use zeroize::Zeroizing;

use super::digest::Sha256;
use super::error::{Error, Result};
use super::hex_bytes::hex_bytes;
use super::key::DataKey;
use super::pem_file::{self, KeyFile};

/// The shortest RSA key accepted.
pub const RSA_BITS_MIN: usize = 3072;

const PUBLIC: &str = "a recipient's public key (RSA, PEM)";
const PRIVATE: &str = "a recipient's private key (RSA, PEM)";

/// The DER of the object identifier rsaEncryption, 1.2.840.113549.1.1.1.
const RSA_ENCRYPTION_OID: [u8; 11] = [0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];

hex_bytes!(
    /// The name of a recipient: the SHA-256 of the public key's SPKI DER.
    RecipientId,
    32
);

/// A recipient's public key.
pub struct RecipientKey {
    id: RecipientId,
    key: OaepPublicEncryptingKey,
}

impl RecipientKey {
    /// Reads a PEM file with the label PUBLIC KEY.
    pub fn from_pem(text: &str) -> Result<Self> {
        let file = pem_file::parse(text, PUBLIC, &[pem_file::PUBLIC_KEY])?;
        let key = PublicEncryptingKey::from_der(&file.der).map_err(|e| refused(PUBLIC, e))?;
        Self::new(key)
    }

    fn new(key: PublicEncryptingKey) -> Result<Self> {
        if key.key_size_bits() < RSA_BITS_MIN {
            return Err(Error::KeyTooShort);
        }
        let spki: PublicKeyX509Der<'_> =
            key.as_der().map_err(|_| Error::Library { operation: "encode an RSA public key" })?;
        let spki = spki.as_ref();
        // An RSA-PSS key parses as well, but is for signatures: what it wrapped nobody would unwrap.
        if !spki.windows(RSA_ENCRYPTION_OID.len()).take(32).any(|window| window == RSA_ENCRYPTION_OID) {
            return Err(Error::KeyFile { expected: PUBLIC, reason: "the key is for signatures only".to_owned() });
        }
        let id = RecipientId(Sha256::digest(spki).0);
        let key = OaepPublicEncryptingKey::new(key).map_err(|_| Error::Library { operation: "take up an RSA key" })?;
        Ok(Self { id, key })
    }

    /// Returns the recipient's name.
    pub fn id(&self) -> RecipientId {
        self.id
    }

    /// Wraps the secret of `data_key`: as many bytes as the RSA key has, other ones each time.
    pub fn wrap(&self, data_key: &DataKey) -> Result<Vec<u8>> {
        let mut wrapped = vec![0; self.key.ciphertext_size()];
        let len = self
            .key
            .encrypt(&OAEP_SHA256_MGF1SHA256, data_key.secret(), &mut wrapped, None)
            .map_err(|_| Error::Library { operation: "wrap a data key" })?
            .len();
        wrapped.truncate(len);
        Ok(wrapped)
    }
}

impl fmt::Debug for RecipientKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecipientKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A recipient's private key.
pub struct RecipientPrivateKey {
    id: RecipientId,
    key: OaepPrivateDecryptingKey,
}

impl RecipientPrivateKey {
    /// Reads a PEM file with the label PRIVATE KEY (PKCS#8) or RSA PRIVATE KEY (PKCS#1).
    pub fn from_pem(text: &str) -> Result<Self> {
        let file = pem_file::parse(text, PRIVATE, &[pem_file::PRIVATE_KEY, pem_file::RSA_PRIVATE_KEY])?;
        let pkcs8 = to_pkcs8(file)?;
        let key = PrivateDecryptingKey::from_pkcs8(&pkcs8).map_err(|e| refused(PRIVATE, e))?;
        let id = RecipientKey::new(key.public_key())?.id;
        let key = OaepPrivateDecryptingKey::new(key).map_err(|_| Error::Library { operation: "take up an RSA key" })?;
        Ok(Self { id, key })
    }

    /// Returns the name of the recipient whose private key this is.
    pub fn recipient_id(&self) -> RecipientId {
        self.id
    }

    /// Unwraps a data key's secret; whether it is the right one, its commitment tells.
    pub fn unwrap(&self, wrapped: &[u8]) -> Result<Zeroizing<[u8; 32]>> {
        let refuse = || Error::NotUnwrapped { recipient: self.id };
        let mut buffer = Zeroizing::new(vec![0; self.key.min_output_size()]);
        let secret =
            self.key.decrypt(&OAEP_SHA256_MGF1SHA256, wrapped, &mut buffer, None).map_err(|_| refuse())?;
        let secret: &[u8; 32] = (&*secret).try_into().map_err(|_| refuse())?;
        Ok(Zeroizing::new(*secret))
    }
}

impl fmt::Debug for RecipientPrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecipientPrivateKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Brings the older PKCS#1 form into PKCS#8.
fn to_pkcs8(file: KeyFile) -> Result<Zeroizing<Vec<u8>>> {
    if file.label != pem_file::RSA_PRIVATE_KEY {
        return Ok(file.der);
    }
    let key = KeyPair::from_der(&file.der).map_err(|e| refused(PRIVATE, e))?;
    let pkcs8: Pkcs8V1Der<'_> =
        key.as_der().map_err(|_| Error::Library { operation: "encode an RSA private key" })?;
    Ok(Zeroizing::new(pkcs8.as_ref().to_vec()))
}

/// Says why the library rejected a key, as far as it tells.
fn refused(expected: &'static str, rejected: KeyRejected) -> Error {
    let reason = match rejected.description_() {
        // The library's own limit is lower than ours.
        "TooSmall" => return Error::KeyTooShort,
        "TooLarge" => "the key is longer than 8192 bits",
        _ => "the key is not an RSA key, or damaged",
    };
    Error::KeyFile { expected, reason: reason.to_owned() }
}
