//! What sources answer: credentials, checked so that they can stand in the header of a request.
//!
//! Bounded: an answer or a file beyond what any credential takes is refused unread.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use jiff::Timestamp;
use serde::Deserialize;

use super::super::super::secret::Secret;
use super::error::SourceError;

/// The largest file of tokens or profiles that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Credentials, and until when they are good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    /// The name of the key.
    pub(super) key_id: String,
    /// The key.
    pub(super) secret: Secret,
    /// What temporary ones need beside the key.
    pub(super) token: Option<Secret>,
    /// When they expire, if they do.
    pub(super) expires_at: Option<Timestamp>,
}

impl Credentials {
    /// Takes credentials that can be used.
    pub(super) fn new(
        key_id: &str,
        secret: &str,
        token: Option<&str>,
        expires_at: Option<Timestamp>,
    ) -> Result<Self, SourceError> {
        for (what, text) in [("access key id", Some(key_id)), ("token", token)] {
            if text.is_some_and(|text| !fits_a_header(text)) {
                let what = format!("its {what} is empty or holds other than visible ASCII characters");
                return Err(SourceError::Refused(what));
            }
        }
        if secret.is_empty() {
            return Err(SourceError::Refused("its secret is empty".to_owned()));
        }
        let hidden = |text: &str| Secret::from(text.to_owned());
        Ok(Self { key_id: key_id.to_owned(), secret: hidden(secret), token: token.map(hidden), expires_at })
    }
}

/// Says whether a key's name or a token can stand in the header of a request.
pub(in crate::storage::s3) fn fits_a_header(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// The JSON of agents and of the metadata service.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Document {
    #[serde(default)]
    code: Option<String>,
    #[serde(default)]
    message: Option<String>,
    #[serde(default)]
    access_key_id: String,
    #[serde(default)]
    secret_access_key: String,
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    expiration: Option<String>,
}

/// Reads the JSON of agents and of the metadata service.
pub(super) fn from_json(body: &[u8]) -> Result<Credentials, SourceError> {
    // Without what serde says: it may quote a secret.
    let document: Document = serde_json::from_slice(body)
        .map_err(|_| SourceError::Refused("its answer is no JSON of credentials".to_owned()))?;
    if let Some(code) = document.code.as_deref().filter(|code| *code != "Success") {
        let message = document.message.unwrap_or_default();
        return Err(SourceError::Refused(shortened(&format!("{code}: {message}"))));
    }
    let Document { access_key_id, secret_access_key, token, expiration, .. } = document;
    let expires_at = expiration.as_deref().map(time).transpose()?;
    Credentials::new(&access_key_id, &secret_access_key, token.as_deref(), expires_at)
}

/// Reads the XML of the security token service.
pub(super) fn from_xml(body: &[u8]) -> Result<Credentials, SourceError> {
    let text = String::from_utf8_lossy(body);
    let element = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(found, _)| found.trim())
    };
    let (Some(key_id), Some(secret), Some(token)) =
        (element("AccessKeyId"), element("SecretAccessKey"), element("SessionToken"))
    else {
        return Err(SourceError::Refused("its answer holds no credentials".to_owned()));
    };
    Credentials::new(key_id, secret, Some(token), element("Expiration").map(time).transpose()?)
}

fn time(text: &str) -> Result<Timestamp, SourceError> {
    text.parse().map_err(|_| SourceError::Refused("it says no time of expiry that can be read".to_owned()))
}

/// The most of a source's own words that is passed on.
const WORDS_MAX: usize = 300;

/// Cuts a source's own words, and leaves control characters out.
pub(super) fn shortened(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(WORDS_MAX).collect()
}

/// Reads a whole file, nothing where it is not there.
pub(super) fn read_file(path: &Path) -> Result<Option<String>, SourceError> {
    let failed = |error: std::io::Error| {
        SourceError::Refused(format!("could not read \"{}\": {error}", path.display()))
    };
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed)?,
    };
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    Ok(Some(text))
}

/// Reads a token, which must be there.
pub(super) fn read_token(path: &Path) -> Result<String, SourceError> {
    let token = read_file(path)?.map(|text| text.trim().to_owned()).filter(|token| !token.is_empty());
    token.ok_or_else(|| SourceError::Refused(format!("there is no token in \"{}\"", path.display())))
}
