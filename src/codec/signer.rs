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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::ErrorKind;

    /// The first test of RFC 8032, section 7.1.
    const RFC_SEED: &str = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
    const RFC_PUBLIC: &str = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
    const RFC_SIGNATURE: &str = "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b";

    fn rfc_keys() -> (SigningKey, VerifyKey) {
        let pkcs8 = hex::decode(format!("302e020100300506032b657004220420{RFC_SEED}")).unwrap();
        let public: [u8; 32] = hex::decode(RFC_PUBLIC).unwrap().try_into().unwrap();
        (
            SigningKey::from_pem(&pem_file::encode(pem_file::PRIVATE_KEY, &pkcs8)).unwrap(),
            VerifyKey::from_pem(&pem_file::encode(pem_file::PUBLIC_KEY, &spki(&public))).unwrap(),
        )
    }

    #[test]
    fn signatures_are_those_of_rfc_8032() {
        let (signing, verify) = rfc_keys();
        assert_eq!(hex::encode(signing.sign(b"")), RFC_SIGNATURE);
        verify.verify(b"", &signing.sign(b"")).unwrap();
        assert_eq!(signing.signer_id(), verify.signer_id());
    }

    #[test]
    fn another_signer_other_bytes_or_another_signature_is_refused() {
        let (signing, verify) = rfc_keys();
        let keys = crate::codec::create_keys(3072).unwrap();
        let (foreign, foreign_verify) =
            (SigningKey::from_pem(&keys.sign_pem).unwrap(), VerifyKey::from_pem(&keys.verify_pem).unwrap());
        let signature = signing.sign(b"header");
        verify.verify(b"header", &signature).unwrap();

        let refused = [
            verify.verify(b"headers", &signature),
            verify.verify(b"heade", &signature),
            verify.verify(b"header", &foreign.sign(b"header")),
            verify.verify(b"header", &[0; SIGNATURE_LEN]),
        ];
        for result in refused {
            let error = result.unwrap_err();
            assert_eq!(error, Error::BadSignature { signer: verify.signer_id() });
            assert_eq!(error.kind(), ErrorKind::Damaged);
        }
        assert!(foreign_verify.verify(b"header", &signature).is_err());
    }

    #[test]
    fn a_signature_has_one_form() {
        // S + L verifies in implementations that do not reduce; then a signature could be altered in the store.
        const L: [u8; 32] = [
            0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
        ];
        let (signing, verify) = rfc_keys();
        let mut signature = signing.sign(b"header");
        let mut carry = 0;
        for (byte, l) in signature[32..].iter_mut().zip(L) {
            let sum = u16::from(*byte) + u16::from(l) + carry;
            *byte = sum as u8;
            carry = sum >> 8;
        }
        assert_eq!(carry, 0);
        assert!(verify.verify(b"header", &signature).is_err());
    }

    proptest! {
        #[test]
        fn no_flipped_bit_verifies(bytes in prop::collection::vec(any::<u8>(), 1..100), at: prop::sample::Index, bit in 0..8) {
            let (signing, verify) = rfc_keys();
            let mut whole = [&signing.sign(&bytes)[..], &bytes].concat();
            let at = at.index(whole.len());
            whole[at] ^= 1_u8 << bit;
            let (signature, bytes) = whole.split_first_chunk::<SIGNATURE_LEN>().unwrap();
            prop_assert!(verify.verify(bytes, signature).is_err());
        }

        #[test]
        fn arbitrary_der_is_no_key(der in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(SigningKey::from_pem(&pem_file::encode(pem_file::PRIVATE_KEY, &der)).is_err());
            prop_assert!(VerifyKey::from_pem(&pem_file::encode(pem_file::PUBLIC_KEY, &der)).is_err());
        }
    }
}
