//! What can go wrong between bytes and bytes, and what the reader of the message should do about it.
//!
//! The distinction that matters to an operator at night: the key is wrong (get the right one, the backup is
//! fine), the bytes are damaged (get other bytes), or a file that was given is not what it should be.

use super::frame::FrameAad;
use super::key::DataKeyId;
use super::recipient::{RSA_BITS_MIN, RecipientId};
use super::signer::SignerId;

/// The result of an operation of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What failed in turning bytes into bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A compressed body does not inflate to what its frame says.
    #[error("{codec} data of {stored_len} bytes does not inflate to {raw_len} bytes: {reason}")]
    Damaged { codec: &'static str, stored_len: usize, raw_len: usize, reason: String },

    /// A codec could not compress; its inputs are ours, so this is not the data's fault.
    #[error("could not compress {raw_len} bytes with {codec}: {reason}")]
    NotCompressed { codec: &'static str, raw_len: usize, reason: String },

    /// A byte names no codec.
    #[error("unknown codec {0}")]
    UnknownCodec(u8),

    /// A byte names no cipher.
    #[error("unknown cipher {0}")]
    UnknownCipher(u8),

    /// A frame is not what was sealed with this key at this place: altered, cut, moved or exchanged.
    #[error("frame at position {} of kind {} is not authentic", .frame.position, .frame.kind)]
    NotAuthentic { frame: FrameAad },

    /// The secret is not the data key that the commitment names.
    #[error("wrong key: the secret does not match the commitment of data key {id}")]
    WrongKey { id: DataKeyId },

    /// A private key does not open a wrapped data key.
    #[error("the private key of recipient {recipient} does not open this wrapped data key")]
    NotUnwrapped { recipient: RecipientId },

    /// A signature does not fit the bytes and the signer.
    #[error("the signature is not that of signer {signer} over these bytes")]
    BadSignature { signer: SignerId },

    /// A key file does not hold the key it should.
    #[error("not {expected}: {reason}")]
    KeyFile { expected: &'static str, reason: String },

    /// A key file is protected by a passphrase.
    #[error("the private key is protected by a passphrase")]
    KeyEncrypted,

    /// An RSA key is too short to be trusted with a data key.
    #[error("the RSA key is too short: at least {RSA_BITS_MIN} bits are needed")]
    KeyTooShort,

    /// A length was asked for in which no RSA key is created.
    #[error("cannot create an RSA key of {bits} bits")]
    KeyLength { bits: u32 },

    /// A compression level is outside what the algorithm has.
    #[error("{codec} has no level {level}")]
    Level { codec: &'static str, level: i32, min: i32, max: i32 },

    /// The cryptographic library refused an operation that cannot fail on valid arguments.
    #[error("the cryptographic library failed to {operation}")]
    Library { operation: &'static str },

    /// A job on the CPU pool panicked; the pool lives on.
    #[error("a job on the CPU pool panicked: {message}")]
    JobPanicked { message: String },
}

/// What an error calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The bytes are not those that were written: use another copy.
    Damaged,
    /// The bytes may be whole, but not for this key: use another key.
    WrongKey,
    /// A file or a setting given by the user has to change.
    FixInput,
    /// Walden is at fault.
    Bug,
}

impl Error {
    /// Returns what the error calls for.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Damaged { .. } | Self::UnknownCodec(_) | Self::UnknownCipher(_) => ErrorKind::Damaged,
            Self::NotAuthentic { .. } | Self::BadSignature { .. } => ErrorKind::Damaged,
            Self::WrongKey { .. } | Self::NotUnwrapped { .. } => ErrorKind::WrongKey,
            Self::KeyFile { .. } | Self::KeyEncrypted | Self::KeyTooShort => ErrorKind::FixInput,
            Self::KeyLength { .. } | Self::Level { .. } => ErrorKind::FixInput,
            Self::NotCompressed { .. } | Self::Library { .. } | Self::JobPanicked { .. } => ErrorKind::Bug,
        }
    }

    /// Returns a sentence on what to do, where there is one to give.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::WrongKey { .. } | Self::NotUnwrapped { .. } => {
                "The stored data may be whole: give the private key of a recipient that the backup names.".into()
            }
            Self::KeyFile { .. } => {
                "`walden key create` writes four files: .pem and .pub.pem hold the recipient, .sign.pem and .verify.pem the signer.".into()
            }
            Self::KeyEncrypted => {
                "Remove the passphrase with `openssl pkey -in FILE -out NEW` and protect the new file by its mode.".into()
            }
            Self::KeyTooShort | Self::KeyLength { .. } => {
                "Create one with `walden key create --bits N`, where N is 3072, 4096 or 8192.".into()
            }
            Self::Level { min, max, .. } if min == max => "Leave the level out: this algorithm has none.".into(),
            Self::Level { min, max, .. } => format!("Choose a level from {min} to {max}, and not 0."),
            _ => return None,
        };
        Some(hint)
    }
}
