//! New keys: one RSA pair for a recipient and one Ed25519 pair for a signer, as PEM that `openssl` reads.
//!
//! The library draws both from the operating system; they are the only secrets not drawn through `Random`.
//! Deliberately absent: writing files and their modes (`cli`).

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::{KeySize, PrivateDecryptingKey};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use zeroize::Zeroizing;

use super::error::{Error, Result};
use super::pem_file;
use super::signer;

/// The four files of `key create`, as text.
pub struct NewKeys {
    /// The recipient's private key, PKCS#8: where backups are read.
    pub private_pem: Zeroizing<String>,
    /// The recipient's public key, SPKI: where backups are written.
    pub public_pem: String,
    /// The signer's private key, PKCS#8: where backups are written or expired.
    pub sign_pem: Zeroizing<String>,
    /// The signer's public key, SPKI: where backups are read.
    pub verify_pem: String,
}

/// Creates both pairs; `bits` is the length of the RSA key, 3072, 4096 or 8192.
///
/// Takes tenths of a second for 3072 bits, many seconds for 8192.
pub fn create_keys(bits: u32) -> Result<NewKeys> {
    let size = match bits {
        3072 => KeySize::Rsa3072,
        4096 => KeySize::Rsa4096,
        8192 => KeySize::Rsa8192,
        _ => return Err(Error::KeyLength { bits }),
    };
    let failed = |operation| move |_| Error::Library { operation };

    let rsa = PrivateDecryptingKey::generate(size).map_err(failed("create an RSA key"))?;
    let private: Pkcs8V1Der<'_> = rsa.as_der().map_err(failed("encode an RSA private key"))?;
    let public: PublicKeyX509Der<'_> =
        rsa.public_key().as_der().map_err(failed("encode an RSA public key"))?;

    let ed25519 = Ed25519KeyPair::generate().map_err(failed("create an Ed25519 key"))?;
    let sign = ed25519.to_pkcs8v1().map_err(failed("encode an Ed25519 private key"))?;
    let verify: &[u8; 32] =
        ed25519.public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes");

    Ok(NewKeys {
        private_pem: pem_file::encode(pem_file::PRIVATE_KEY, private.as_ref()),
        public_pem: pem_file::encode(pem_file::PUBLIC_KEY, public.as_ref()).to_string(),
        sign_pem: pem_file::encode(pem_file::PRIVATE_KEY, sign.as_ref()),
        verify_pem: pem_file::encode(pem_file::PUBLIC_KEY, &signer::spki(verify)).to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{ErrorKind, RecipientKey, VerifyKey};

    #[test]
    fn new_keys_are_new_and_of_the_length_asked_for() {
        let (a, b) = (create_keys(3072).unwrap(), create_keys(4096).unwrap());
        let ids = [&a, &b].map(|keys| {
            (
                RecipientKey::from_pem(&keys.public_pem).unwrap().id(),
                VerifyKey::from_pem(&keys.verify_pem).unwrap().signer_id(),
            )
        });
        assert_ne!(ids[0].0, ids[1].0);
        assert_ne!(ids[0].1, ids[1].1);
        assert!(b.public_pem.len() > a.public_pem.len());
    }

    #[test]
    fn lengths_that_are_too_short_or_odd_are_refused_with_a_hint() {
        for bits in [0, 1024, 2048, 3000, 5000, 16_384, u32::MAX] {
            let error = create_keys(bits).err().unwrap();
            assert_eq!(error, Error::KeyLength { bits });
            assert_eq!(error.kind(), ErrorKind::FixInput);
            assert!(error.hint().unwrap().contains("3072, 4096 or 8192"));
        }
    }
}
