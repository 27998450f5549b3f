//! The text around a key: PEM blocks, as `openssl` writes and reads them.
//!
//! A key file has one block. What is wrong with a file is told by what it holds instead, because exchanging
//! the four files of `key create` is the likely mistake. Nothing of a file's content appears in a message.

use pem::{EncodeConfig, LineEnding, Pem};
use zeroize::{Zeroize, Zeroizing};

use super::error::{Error, Result};

/// The largest key file looked at; an RSA key of 8192 bits takes 6.4 kB.
const PEM_BYTES_MAX: usize = 64 * 1024;

pub(super) const PRIVATE_KEY: &str = "PRIVATE KEY";
pub(super) const PUBLIC_KEY: &str = "PUBLIC KEY";
pub(super) const RSA_PRIVATE_KEY: &str = "RSA PRIVATE KEY";
const ENCRYPTED_PRIVATE_KEY: &str = "ENCRYPTED PRIVATE KEY";

/// The label and the DER bytes of a key file.
pub(super) struct KeyFile {
    pub label: String,
    pub der: Zeroizing<Vec<u8>>,
}

/// Reads the one PEM block of a key file; `expected` is what the caller hopes for, with its article.
pub(super) fn parse(text: &str, expected: &'static str, labels: &[&str]) -> Result<KeyFile> {
    let refuse = |reason: &str| Error::KeyFile { expected, reason: reason.to_owned() };
    if text.len() > PEM_BYTES_MAX {
        return Err(refuse("the file is too long for a key"));
    }
    let mut blocks = pem::parse_many(text).map_err(|_| refuse("the file is not whole PEM"))?;
    let block = match (blocks.pop(), blocks.is_empty()) {
        (Some(block), true) => block,
        (None, _) => return Err(refuse("the file has no PEM block")),
        (Some(_), false) => return Err(refuse("the file has several PEM blocks")),
    };
    let label = block.tag().to_owned();
    let legacy_passphrase = block.headers().get("DEK-Info").is_some();
    let der = Zeroizing::new(block.into_contents());
    if label == ENCRYPTED_PRIVATE_KEY || legacy_passphrase {
        return Err(Error::KeyEncrypted);
    }
    if !labels.contains(&label.as_str()) {
        let label: String = label.chars().take(40).collect();
        return Err(refuse(&format!("the file holds a block \"{label}\"")));
    }
    Ok(KeyFile { label, der })
}

/// Writes one PEM block with the line ends of Unix.
pub(super) fn encode(label: &str, der: &[u8]) -> Zeroizing<String> {
    let block = Pem::new(label, der);
    let text = pem::encode_config(&block, EncodeConfig::new().set_line_ending(LineEnding::LF));
    block.into_contents().zeroize();
    Zeroizing::new(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: &str = "a key";

    fn read(text: &str) -> Result<KeyFile> {
        parse(text, WANTED, &[PUBLIC_KEY])
    }

    fn reason(text: &str) -> String {
        match read(text) {
            Err(Error::KeyFile { expected: WANTED, reason }) => reason,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("accepted {text:?}"),
        }
    }

    #[test]
    fn text_around_the_block_and_foreign_line_ends_do_not_matter() {
        let text = encode(PUBLIC_KEY, &[1, 2, 3]);
        assert_eq!(*text, "-----BEGIN PUBLIC KEY-----\nAQID\n-----END PUBLIC KEY-----\n");
        for text in
            [text.to_string(), text.replace('\n', "\r\n"), format!("# key of the vault\n\n{}\n", *text)]
        {
            let file = read(&text).unwrap();
            assert_eq!(file.label, PUBLIC_KEY);
            assert_eq!(*file.der, [1, 2, 3]);
        }
    }

    #[test]
    fn the_message_says_what_the_file_holds_instead() {
        let key = encode(PUBLIC_KEY, &[1, 2, 3]);
        assert_eq!(reason(""), "the file has no PEM block");
        assert_eq!(reason("ssh-ed25519 AAAA walden"), "the file has no PEM block");
        assert_eq!(reason(&format!("{}{}", *key, *key)), "the file has several PEM blocks");
        assert_eq!(reason(&encode("CERTIFICATE", &[1])), "the file holds a block \"CERTIFICATE\"");
        assert_eq!(reason(&key.replace("AQID", "A!ID")), "the file is not whole PEM");
        assert_eq!(
            reason(&format!("{}{}", *key, " ".repeat(PEM_BYTES_MAX))),
            "the file is too long for a key"
        );
    }

    #[test]
    fn a_passphrase_is_recognized_in_both_forms() {
        let pkcs8 = encode(ENCRYPTED_PRIVATE_KEY, &[1, 2, 3]);
        let legacy = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nAQID\n-----END RSA PRIVATE KEY-----\n";
        for text in [pkcs8.as_str(), legacy] {
            assert_eq!(read(text).err(), Some(Error::KeyEncrypted));
        }
    }
}
