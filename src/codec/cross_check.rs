//! Tests against other people's code: `openssl` for keys, wrapping and signatures, `aes-gcm` for frames.
//!
//! What Walden writes has to be readable without Walden. Where `openssl` is missing the test says what it skipped,
//! and fails when `CI` is set.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Key, Nonce};
use tempfile::TempDir;

use super::key::hkdf_sha256;
use super::{
    CodecId, DataKey, Error, ErrorKind, FrameAad, RecipientKey, RecipientPrivateKey, SeededRandom, Sha256,
    SigningKey, VerifyKey, create_keys,
};

/// The `openssl` program in a folder of its own.
struct OpenSsl {
    folder: TempDir,
}

impl OpenSsl {
    /// Finds the program; `None` is a skipped test, and said.
    fn find() -> Option<Self> {
        if Command::new("openssl").arg("version").output().is_ok_and(|output| output.status.success()) {
            return Some(Self { folder: tempfile::tempdir().unwrap() });
        }
        assert!(
            std::env::var_os("CI").is_none(),
            "openssl is not installed: its cross-checks cannot be skipped in CI"
        );
        eprintln!("SKIPPED: openssl is not installed, keys were not checked against it");
        None
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Runs a command line split at spaces, and returns what it printed.
    fn run(&self, line: &str) -> Vec<u8> {
        let output =
            Command::new("openssl").args(line.split(' ')).current_dir(self.folder.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "openssl {line}: {stderr}");
        output.stdout
    }
}

const OAEP: &str = "-pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_md:sha256 -pkeyopt rsa_mgf1_md:sha256";

#[test]
fn frames_are_aes_256_gcm_as_aes_gcm_computes_it() {
    let (salt, identity) = ([3; 32], b"walden/1 some identity");
    let data_key = DataKey::generate(&SeededRandom::new(5));
    let frame = FrameAad { kind: 2, position: 77, last: true, codec: CodecId::Lz4, raw_len: 1234 };
    let body = vec![0xa5; 5000];
    let sealed = data_key.frame_key(&salt, identity).seal(&frame, body.clone());

    let key = hkdf_sha256(&salt, data_key.secret(), identity);
    let other = Aes256Gcm::new(&Key::<Aes256Gcm>::from(*key));
    let nonce = Nonce::from([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 77]);
    let aad = [2, 77, 0, 0, 0, 0, 0, 0, 0, 1, 3, 0xd2, 0x04, 0, 0];
    let theirs = other.encrypt(&nonce, Payload { msg: &body, aad: &aad }).unwrap();
    assert_eq!(sealed, theirs);
    assert_eq!(other.decrypt(&nonce, Payload { msg: &sealed, aad: &aad }).unwrap(), body);
}

#[test]
fn openssl_reads_the_keys_we_create() {
    let Some(openssl) = OpenSsl::find() else { return };
    let keys = create_keys(3072).unwrap();
    for (name, text) in [
        ("key.pem", keys.private_pem.as_str()),
        ("key.pub.pem", &keys.public_pem),
        ("key.sign.pem", &keys.sign_pem),
        ("key.verify.pem", &keys.verify_pem),
    ] {
        openssl.write(name, text);
    }

    let check = String::from_utf8(openssl.run("pkey -in key.pem -check -noout -text")).unwrap();
    assert!(check.contains("Key is valid") && check.contains("3072 bit"), "{check}");
    assert_eq!(openssl.run("pkey -in key.pem -pubout"), keys.public_pem.as_bytes());
    assert_eq!(openssl.run("pkey -in key.sign.pem -pubout"), keys.verify_pem.as_bytes());
    // Written as openssl writes them, to the last byte.
    assert_eq!(openssl.run("pkey -in key.pem"), keys.private_pem.as_bytes());
    assert_eq!(openssl.run("pkey -in key.sign.pem"), keys.sign_pem.as_bytes());

    let recipient = RecipientKey::from_pem(&keys.public_pem).unwrap();
    let spki = openssl.run("pkey -pubin -in key.pub.pem -outform DER");
    assert_eq!(recipient.id().0, Sha256::digest(&spki).0);
    assert_eq!(RecipientPrivateKey::from_pem(&keys.private_pem).unwrap().recipient_id(), recipient.id());

    let signer = VerifyKey::from_pem(&keys.verify_pem).unwrap();
    let spki = openssl.run("pkey -pubin -in key.verify.pem -outform DER");
    assert_eq!(signer.signer_id().0, Sha256::digest(&spki).0);
    assert_eq!(SigningKey::from_pem(&keys.sign_pem).unwrap().signer_id(), signer.signer_id());
}

#[test]
fn wrapped_keys_go_to_openssl_and_back() {
    let Some(openssl) = OpenSsl::find() else { return };
    openssl.run("genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:3072 -out key.pem");
    openssl.run("pkey -in key.pem -pubout -out key.pub.pem");
    openssl.run("rsa -in key.pem -traditional -out pkcs1.pem");
    let data_key = DataKey::generate(&SeededRandom::new(1));
    let recipient = RecipientKey::from_pem(&openssl.read("key.pub.pem")).unwrap();

    openssl.write("wrapped", recipient.wrap(&data_key).unwrap());
    let secret = openssl.run(&format!("pkeyutl -decrypt -inkey key.pem -in wrapped {OAEP}"));
    assert_eq!(secret, data_key.secret());

    openssl.write("secret", data_key.secret());
    let wrapped = openssl.run(&format!("pkeyutl -encrypt -pubin -inkey key.pub.pem -in secret {OAEP}"));
    for file in ["key.pem", "pkcs1.pem"] {
        let private = RecipientPrivateKey::from_pem(&openssl.read(file)).unwrap();
        assert_eq!(private.recipient_id(), recipient.id());
        assert_eq!(&*private.unwrap(&wrapped).unwrap(), data_key.secret());
    }

    // OAEP with SHA-1, which is what openssl does when it is not told.
    let other =
        openssl.run("pkeyutl -encrypt -pubin -inkey key.pub.pem -in secret -pkeyopt rsa_padding_mode:oaep");
    let private = RecipientPrivateKey::from_pem(&openssl.read("key.pem")).unwrap();
    assert_eq!(private.unwrap(&other).unwrap_err(), Error::NotUnwrapped { recipient: recipient.id() });
}

#[test]
fn signatures_go_to_openssl_and_back() {
    let Some(openssl) = OpenSsl::find() else { return };
    openssl.run("genpkey -algorithm ED25519 -out sign.pem");
    openssl.run("pkey -in sign.pem -pubout -out verify.pem");
    let signing = SigningKey::from_pem(&openssl.read("sign.pem")).unwrap();
    let verify = VerifyKey::from_pem(&openssl.read("verify.pem")).unwrap();
    assert_eq!(signing.signer_id(), verify.signer_id());

    let header = b"{\"outcome\":\"complete\"}";
    openssl.write("header", header);
    openssl.write("signature", signing.sign(header));
    openssl.run("pkeyutl -verify -pubin -inkey verify.pem -rawin -in header -sigfile signature");
    openssl.run("pkeyutl -sign -inkey sign.pem -rawin -in header -out theirs");
    let theirs: [u8; 64] = fs::read(openssl.path("theirs")).unwrap().try_into().unwrap();
    verify.verify(header, &theirs).unwrap();
}

#[test]
fn keys_that_will_not_do_are_refused_for_what_they_are() {
    let Some(openssl) = OpenSsl::find() else { return };
    openssl.run("genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:1024 -out rsa1024.pem");
    openssl.run("genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out rsa2048.pem");
    openssl.run("genpkey -algorithm RSA-PSS -pkeyopt rsa_keygen_bits:3072 -out pss.pem");
    openssl.run("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out ec.pem");
    openssl.run("genpkey -algorithm ED25519 -out ed25519.pem");
    for name in ["rsa1024", "rsa2048", "pss", "ec", "ed25519"] {
        openssl.run(&format!("pkey -in {name}.pem -pubout -out {name}.pub.pem"));
    }
    openssl.run("pkey -in rsa2048.pem -aes256 -passout pass:secret -out passphrase.pem");
    openssl.run("rsa -in rsa2048.pem -traditional -aes256 -passout pass:secret -out passphrase1.pem");

    let public = |name: &str| RecipientKey::from_pem(&openssl.read(name)).unwrap_err();
    let private = |name: &str| RecipientPrivateKey::from_pem(&openssl.read(name)).unwrap_err();
    for name in ["rsa1024", "rsa2048"] {
        for error in [public(&format!("{name}.pub.pem")), private(&format!("{name}.pem"))] {
            assert_eq!(error, Error::KeyTooShort, "{name}");
            assert_eq!(error.to_string(), "the RSA key is too short: at least 3072 bits are needed");
            assert!(error.hint().unwrap().contains("walden key create"));
        }
    }
    assert_eq!(private("passphrase.pem"), Error::KeyEncrypted);
    assert_eq!(private("passphrase1.pem"), Error::KeyEncrypted);

    let sign = |name: &str| SigningKey::from_pem(&openssl.read(name)).unwrap_err();
    let verify = |name: &str| VerifyKey::from_pem(&openssl.read(name)).unwrap_err();
    let others = [
        public("pss.pub.pem"),
        public("ec.pub.pem"),
        public("ed25519.pub.pem"),
        public("ed25519.pem"),
        private("pss.pem"),
        private("ec.pem"),
        private("ed25519.pem"),
        private("rsa2048.pub.pem"),
        sign("rsa2048.pem"),
        sign("ec.pem"),
        sign("ed25519.pub.pem"),
        verify("rsa2048.pub.pem"),
        verify("ec.pub.pem"),
        verify("ed25519.pem"),
    ];
    for error in others {
        assert!(matches!(error, Error::KeyFile { .. }), "{error}");
        assert_eq!(error.kind(), ErrorKind::FixInput);
        assert!(error.hint().is_some());
    }
    let exchanged = public("ed25519.pem").to_string();
    assert_eq!(exchanged, "not a recipient's public key (RSA, PEM): the file holds a block \"PRIVATE KEY\"");
}
