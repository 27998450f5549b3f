//! Plain documents that a signer vouches for: `begin`, `backup.json`, `expired`.
//!
//! Two lines. The first is the document, JSON without line breaks; the second names the signer and carries the
//! signature over the identity and the exact bytes of the first. Nothing is parsed before the signature holds.
//! A host without a signing key writes the first line only.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::codec::SignerId;
use crate::repo::error::Error;
use crate::repo::identity::Identity;
use crate::repo::keyring::{Keyring, Trust};
use crate::repo::text_forms::hex_bytes;

/// Documents hold wrapped keys, node names and versions, never lists that grow with the cluster.
pub const DOCUMENT_BYTES_MAX: u64 = 4 << 20;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SignatureLine {
    #[serde(with = "hex_bytes")]
    signer: [u8; 32],
    signature: String,
}

/// Writes `document` and signs it as the object of `identity`.
pub fn seal_document<T: Serialize>(
    keyring: &Keyring,
    identity: &Identity,
    document: &T,
) -> Result<Bytes, Error> {
    let mut bytes = serde_json::to_vec(document).map_err(|error| Error::Internal(error.to_string()))?;
    let signature = keyring.sign(identity, &bytes);
    bytes.push(b'\n');
    if let Some((signer, signature)) = signature {
        let line = SignatureLine { signer: signer.0, signature: BASE64.encode(signature) };
        serde_json::to_writer(&mut bytes, &line).map_err(|error| Error::Internal(error.to_string()))?;
        bytes.push(b'\n');
    }
    Ok(bytes.into())
}

/// Verifies the object of `identity` and only then reads its document.
pub fn open_document<T: DeserializeOwned>(
    keyring: &Keyring,
    identity: &Identity,
    bytes: &[u8],
    object: &str,
) -> Result<(T, Trust), Error> {
    let damaged = |detail: &str| Error::damaged(object, detail);
    let end =
        bytes.iter().position(|byte| *byte == b'\n').ok_or_else(|| damaged("it has no complete line"))?;
    let (payload, rest) = (&bytes[..end], &bytes[end + 1..]);
    let signature = parse_signature(rest).map_err(damaged)?;
    let trust = keyring.verify(identity, payload, signature.as_ref(), object)?;
    let document = serde_json::from_slice(payload).map_err(|error| Error::damaged(object, error))?;
    Ok((document, trust))
}

fn parse_signature(line: &[u8]) -> Result<Option<(SignerId, [u8; 64])>, &'static str> {
    if line.is_empty() {
        return Ok(None);
    }
    let line = line.strip_suffix(b"\n").ok_or("its signature is cut off")?;
    let line: SignatureLine =
        serde_json::from_slice(line).map_err(|_| "its second line is not a signature")?;
    let signature = BASE64.decode(&line.signature).ok().and_then(|bytes| bytes.try_into().ok());
    Ok(Some((SignerId(line.signer), signature.ok_or("its signature is not 64 bytes")?)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use serde_json::Value;

    use crate::codec::{SeededRandom, SigningKey, VerifyKey};
    use crate::repo::id::ClusterId;
    use crate::repo::identity::ObjectKind;
    use crate::repo::keyring::KeyringOptions;

    use super::*;

    fn identity() -> Identity {
        Identity {
            kind: ObjectKind::Begin,
            site: uuid::Uuid::nil(),
            cluster: ClusterId::UNKNOWN,
            timeline: None,
            name: String::new(),
            part: String::new(),
        }
    }

    /// A host that signs, and whose word it takes alone.
    fn signing() -> Keyring {
        let signer =
            SigningKey::from_pem(include_str!("../../tests/data/golden-1/keys/test.sign.pem")).unwrap();
        let verify = include_str!("../../tests/data/golden-1/keys/test.verify.pem");
        let trusted_signers = vec![VerifyKey::from_pem(verify).unwrap()];
        let random = Arc::new(SeededRandom::new(7));
        let (recipients, wal_recipients, private_keys) = (Vec::new(), Vec::new(), Vec::new());
        let signer = Some(signer);
        let options =
            KeyringOptions { recipients, wal_recipients, signer, trusted_signers, private_keys, random };
        Keyring::new(options)
    }

    proptest! {
        #[test]
        fn a_damaged_document_is_refused_by_who_trusts_a_signer_and_harms_no_other(
            text in "\\PC{0,20}", at: usize, flip in 1u8.., cut: usize,
        ) {
            let (signing, trusting) = (signing(), Keyring::unencrypted(Arc::new(SeededRandom::new(1))));
            let bytes = seal_document(&signing, &identity(), &text).unwrap();
            let whole = open_document::<String>(&signing, &identity(), &bytes, "x").unwrap().0;
            prop_assert_eq!(&whole, &text);
            let end = bytes.iter().position(|byte| *byte == b'\n').unwrap();
            let mut damaged = bytes.to_vec();
            damaged[at % bytes.len()] ^= flip;
            let _ = open_document::<Value>(&trusting, &identity(), &damaged, "x");
            // Of the second line too no bit may differ, but for the blanks and the letters that JSON takes for equal.
            if at % bytes.len() <= end {
                prop_assert!(open_document::<Value>(&signing, &identity(), &damaged, "x").is_err());
            }
            let cut = &bytes[..cut % bytes.len()];
            prop_assert!(open_document::<Value>(&signing, &identity(), cut, "x").is_err());
            let _ = open_document::<Value>(&trusting, &identity(), cut, "x");
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>, line: Vec<u8>) {
            let keyring = Keyring::unencrypted(Arc::new(SeededRandom::new(1)));
            let _ = open_document::<Value>(&keyring, &identity(), &bytes, "x");
            let _ = open_document::<Value>(&keyring, &identity(), &[b"{}\n", &line[..]].concat(), "x");
            let _ = (parse_signature(&line), parse_signature(&[&line[..], b"\n"].concat()));
        }
    }
}
