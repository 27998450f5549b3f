//! How byte strings and ciphers stand in the JSON of our documents, for `#[serde(with = …)]`.
//! Hex where people compare (ids, digests), base64 where nobody does (wrapped keys).

/// Ciphers by name.
pub(crate) mod cipher_name {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::codec::Cipher;

    /// Writes the name.
    pub fn serialize<S: Serializer>(cipher: &Cipher, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match cipher {
            Cipher::None => "none",
            Cipher::Aes256Gcm => "aes-256-gcm",
        })
    }

    /// Reads a name; others than these are refused.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Cipher, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "none" => Ok(Cipher::None),
            "aes-256-gcm" => Ok(Cipher::Aes256Gcm),
            other => Err(D::Error::custom(format!("unknown cipher {other:?}"))),
        }
    }
}

/// Fixed-size byte arrays as lower-case hex.
pub(crate) mod hex_bytes {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes twice as many digits as there are bytes.
    pub fn serialize<S: Serializer, const N: usize>(
        bytes: &[u8; N],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    /// Reads exactly that many.
    pub fn deserialize<'de, D: Deserializer<'de>, const N: usize>(
        deserializer: D,
    ) -> Result<[u8; N], D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut bytes = [0; N];
        hex::decode_to_slice(&text, &mut bytes).map_err(D::Error::custom)?;
        Ok(bytes)
    }
}

/// Byte strings as base64.
pub(crate) mod base64_bytes {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes base64 with padding.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    /// Reads base64 with padding.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}
