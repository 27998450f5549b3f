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
        // An RSA-PSS key is read but not written by the library; nobody could unwrap what it wrapped.
        let spki: PublicKeyX509Der<'_> = key.as_der().map_err(|_| Error::KeyFile {
            expected: PUBLIC,
            reason: "the key is for signatures only".to_owned(),
        })?;
        let id = RecipientId(Sha256::digest(spki.as_ref()).0);
        let key = OaepPublicEncryptingKey::new(key)
            .map_err(|_| Error::Library { operation: "take up an RSA key" })?;
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
        let key = OaepPrivateDecryptingKey::new(key)
            .map_err(|_| Error::Library { operation: "take up an RSA key" })?;
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::{ErrorKind, SeededRandom, create_keys};

    fn pair() -> (RecipientKey, RecipientPrivateKey) {
        let keys = create_keys(3072).unwrap();
        let public = RecipientKey::from_pem(&keys.public_pem).unwrap();
        (public, RecipientPrivateKey::from_pem(&keys.private_pem).unwrap())
    }

    #[test]
    fn a_wrapped_key_is_opened_by_its_recipient_alone() {
        let data_key = DataKey::generate(&SeededRandom::new(1));
        let (public, private) = pair();
        let (other_public, other_private) = pair();
        assert_ne!(public.id(), other_public.id());

        let wrapped = public.wrap(&data_key).unwrap();
        assert_eq!(wrapped.len(), 384);
        assert_ne!(public.wrap(&data_key).unwrap(), wrapped, "OAEP draws a seed each time");
        let secret = private.unwrap(&wrapped).unwrap();
        let opened = DataKey::from_secret(data_key.id(), secret, &data_key.commitment()).unwrap();
        assert_eq!(opened.secret(), data_key.secret());

        let error = other_private.unwrap(&wrapped).unwrap_err();
        assert_eq!(error, Error::NotUnwrapped { recipient: other_public.id() });
        assert_eq!(error.kind(), ErrorKind::WrongKey);
        assert!(error.to_string().contains(&other_public.id().to_string()));
    }

    #[test]
    fn a_wrapped_copy_that_was_altered_cut_or_never_was_one_does_not_open() {
        let (public, private) = pair();
        let wrapped = public.wrap(&DataKey::generate(&SeededRandom::new(1))).unwrap();
        let mut flipped = wrapped.clone();
        flipped[200] ^= 1;
        for wrong in [
            flipped,
            wrapped[..383].to_vec(),
            [&wrapped[..], &[0]].concat(),
            [&[0], &wrapped[..]].concat(),
            vec![],
            vec![0; 384],
            vec![0xff; 384],
        ] {
            assert!(private.unwrap(&wrong).is_err(), "{} bytes", wrong.len());
        }
    }

    #[test]
    fn a_wrapped_secret_of_another_length_is_refused() {
        let (public, private) = pair();
        let mut wrapped = vec![0; public.key.ciphertext_size()];
        public.key.encrypt(&OAEP_SHA256_MGF1SHA256, &[1; 33], &mut wrapped, None).unwrap();
        assert!(private.unwrap(&wrapped).is_err());
        public.key.encrypt(&OAEP_SHA256_MGF1SHA256, &[1; 32], &mut wrapped, Some(b"label")).unwrap();
        assert!(private.unwrap(&wrapped).is_err(), "the label is empty");
        public.key.encrypt(&OAEP_SHA256_MGF1SHA256, &[1; 32], &mut wrapped, None).unwrap();
        assert_eq!(*private.unwrap(&wrapped).unwrap(), [1; 32]);
    }

    proptest! {
        #[test]
        fn arbitrary_text_is_no_key(text in "(-----BEGIN [A-Z ]{0,20}-----\n)?[ -~\n]{0,200}(-----END [A-Z ]{0,20}-----\n)?") {
            prop_assert!(RecipientKey::from_pem(&text).is_err());
            prop_assert!(RecipientPrivateKey::from_pem(&text).is_err());
        }

        #[test]
        fn arbitrary_der_is_no_key(der in prop::collection::vec(any::<u8>(), 0..500)) {
            prop_assert!(RecipientKey::from_pem(&pem_file::encode(pem_file::PUBLIC_KEY, &der)).is_err());
            for label in [pem_file::PRIVATE_KEY, pem_file::RSA_PRIVATE_KEY] {
                prop_assert!(RecipientPrivateKey::from_pem(&pem_file::encode(label, &der)).is_err());
            }
        }
    }
}
