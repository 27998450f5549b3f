//! Signers: who wrote. Ed25519 (RFC 8032) over exact bytes.
//!
//! A signer is named by the SHA-256 of its public key's SPKI DER. Signing is deterministic, so the same bytes
//! always carry the same signature. Deliberately absent: which signers are trusted, and what is signed.

use std::fmt;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, ParsedPublicKey};

use super::digest::Sha256;
use super::error::{Error, Result};
use super::hex_bytes::hex_bytes;
use super::pem_file;

/// The length of a signature.
pub const SIGNATURE_LEN: usize = 64;

const PUBLIC_KEY_LEN: usize = 32;

const PRIVATE: &str = "a signer's signing key (Ed25519, PEM)";
const PUBLIC: &str = "a signer's verify key (Ed25519, PEM)";

/// What stands before the 32 bytes of an Ed25519 public key in its SPKI DER (RFC 8410), in its one form.
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

hex_bytes!(
    /// The name of a signer: the SHA-256 of the public key's SPKI DER.
    SignerId,
    32
);

/// A signer's private key.
pub struct SigningKey {
    id: SignerId,
    key: Ed25519KeyPair,
}

impl SigningKey {
    /// Reads a PEM file with the label PRIVATE KEY (PKCS#8).
    pub fn from_pem(text: &str) -> Result<Self> {
        let file = pem_file::parse(text, PRIVATE, &[pem_file::PRIVATE_KEY])?;
        let key = Ed25519KeyPair::from_pkcs8(&file.der).map_err(|_| not_ed25519(PRIVATE))?;
        Self::new(key)
    }

    fn new(key: Ed25519KeyPair) -> Result<Self> {
        let public = key.public_key().as_ref().try_into().map_err(|_| not_ed25519(PRIVATE))?;
        Ok(Self { id: signer_id(&spki(public)), key })
    }

    /// Returns the signer's name.
    pub fn signer_id(&self) -> SignerId {
        self.id
    }

    /// Signs exactly these bytes.
    pub fn sign(&self, bytes: &[u8]) -> [u8; SIGNATURE_LEN] {
        let signature = self.key.sign(bytes);
        signature.as_ref().try_into().expect("an Ed25519 signature has 64 bytes")
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A signer's public key.
#[derive(Clone)]
pub struct VerifyKey {
    id: SignerId,
    key: ParsedPublicKey,
}

impl VerifyKey {
    /// Reads a PEM file with the label PUBLIC KEY.
    pub fn from_pem(text: &str) -> Result<Self> {
        let file = pem_file::parse(text, PUBLIC, &[pem_file::PUBLIC_KEY])?;
        let public = file.der.strip_prefix(&SPKI_PREFIX).ok_or_else(|| not_ed25519(PUBLIC))?;
        if public.len() != PUBLIC_KEY_LEN {
            return Err(not_ed25519(PUBLIC));
        }
        let key = ParsedPublicKey::new(&ED25519, public).map_err(|_| not_ed25519(PUBLIC))?;
        Ok(Self { id: signer_id(&file.der), key })
    }

    /// Returns the signer's name.
    pub fn signer_id(&self) -> SignerId {
        self.id
    }

    /// Refuses a signature that this signer did not make over exactly these bytes.
    pub fn verify(&self, bytes: &[u8], signature: &[u8; SIGNATURE_LEN]) -> Result<()> {
        self.key.verify_sig(bytes, signature).map_err(|_| Error::BadSignature { signer: self.id })
    }
}

impl fmt::Debug for VerifyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Encodes a public key as SPKI DER.
pub(super) fn spki(public: &[u8; PUBLIC_KEY_LEN]) -> Vec<u8> {
    [&SPKI_PREFIX[..], public].concat()
}

fn signer_id(spki: &[u8]) -> SignerId {
    SignerId(Sha256::digest(spki).0)
}

fn not_ed25519(expected: &'static str) -> Error {
    Error::KeyFile { expected, reason: "the key is not an Ed25519 key, or damaged".to_owned() }
}
