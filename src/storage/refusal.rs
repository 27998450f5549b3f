//! A store's own words when it answers a request with anything but success.
//!
//! They travel as a source of `storage::Error`, so that the message can quote them, the hint can follow from the
//! store's code, and a retry can wait as long as the store asks for.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use super::error::Source;

/// The most of a store's own words that is passed on.
const MESSAGE_CHARACTERS_MAX: usize = 300;

/// An answer that is no success.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) struct Refusal {
    /// The HTTP status.
    pub(super) status: u16,
    /// The store's code, such as `NoSuchKey`; empty if the body gives none.
    pub(super) code: String,
    /// The store's words.
    pub(super) message: String,
    /// How long the store wants to be left alone.
    pub(super) retry_after: Option<Duration>,
}

/// What became of a request that nobody took, or that nobody said anything to.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unheard(pub(super) String);

impl Refusal {
    /// Reads an answer: the value of its `Retry-After`, as far as that is in seconds, and its body.
    pub(super) fn parse(status: u16, retry_after: Option<&str>, body: &[u8]) -> Self {
        let body = String::from_utf8_lossy(body);
        let seconds = retry_after.and_then(|text| text.trim().parse().ok());
        Self {
            status,
            code: element(&body, "Code"),
            message: element(&body, "Message"),
            retry_after: seconds.map(Duration::from_secs),
        }
    }

    /// Returns what somebody can do about it who may change the configuration or the host.
    pub(super) fn hint(&self) -> Option<&'static str> {
        Some(match (self.status, self.code.as_str()) {
            (_, "RequestTimeTooSkewed" | "RequestExpired") => {
                "Set the clock of this host: the store takes requests for a few minutes after they were signed."
            }
            (_, "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "NotSignedUp") => {
                "Check access_key_id and the secret that belongs to it."
            }
            (_, "ExpiredToken" | "InvalidToken") => {
                "Replace the temporary credentials and their session_token."
            }
            (_, "NoSuchBucket") => "Create the bucket, or correct url and endpoint.",
            (301 | 307 | 308, _)
            | (_, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => {
                "Set region and endpoint to those of the bucket."
            }
            (401 | 403, _) => {
                "Allow these credentials to list, read, create and delete objects in the bucket."
            }
            _ => return None,
        })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HTTP status {}", self.status)?;
        for part in [&self.code, &self.message] {
            if !part.is_empty() {
                write!(f, ": {part}")?;
            }
        }
        Ok(())
    }
}

/// Returns the text of the first element of that name, shortened and without control characters.
fn element(xml: &str, name: &str) -> String {
    let text =
        xml.split_once(&format!("<{name}>")).and_then(|(_, rest)| rest.split_once(&format!("</{name}>")));
    let text = text.map_or("", |(text, _)| text);
    text.chars().filter(|character| !character.is_control()).take(MESSAGE_CHARACTERS_MAX).collect()
}

/// Finds an error of one type in an error or among its sources.
pub(super) fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut current = error;
    loop {
        // A shared error stands in the chain by its pointer, which leads past the error itself.
        if let Some(shared) = current.downcast_ref::<Source>() {
            current = &**shared;
        }
        if let Some(found) = current.downcast_ref() {
            return Some(found);
        }
        current = current.source()?;
    }
}

/// Says whether TLS ended over a certificate, which trying again does not change.
pub(super) fn is_about_a_certificate(error: &(dyn StdError + 'static)) -> bool {
    // By its text, which stands in rustls: naming the type would take another dependency of the same
    // version.
    const TEXT: &str = "invalid peer certificate";
    let mut current = Some(error);
    while let Some(error) = current {
        if error.to_string().contains(TEXT) {
            return true;
        }
        current = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_refusal_is_read_from_whatever_the_body_is() {
        let body =
            b"<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code><Message>It is\n gone</Message></Error>";
        let refusal = Refusal::parse(404, None, body);
        assert_eq!((refusal.code.as_str(), refusal.message.as_str()), ("NoSuchKey", "It is gone"));
        assert_eq!(refusal.to_string(), "HTTP status 404: NoSuchKey: It is gone");
        for body in [&b""[..], b"<html>", b"<Code>x", b"</Code><Code>", b"\xff\xfe<Code"] {
            assert_eq!(Refusal::parse(502, None, body).to_string(), "HTTP status 502");
        }
        let long = format!("<Message>{}</Message>", "x".repeat(5000));
        assert_eq!(Refusal::parse(500, None, long.as_bytes()).message.len(), MESSAGE_CHARACTERS_MAX);
    }

    #[test]
    fn only_seconds_are_taken_for_a_time_to_wait() {
        let told = |value| Refusal::parse(503, Some(value), b"").retry_after;
        assert_eq!(told(" 7 "), Some(Duration::from_secs(7)));
        for value in ["", "-1", "1.5", "Fri, 20 Nov 2026 10:15:00 GMT", "99999999999999999999"] {
            assert_eq!(told(value), None, "{value}");
        }
    }

    #[test]
    fn what_can_be_mended_has_a_hint() {
        let hint = |status, code: &str| {
            let refusal =
                Refusal { status, code: code.to_owned(), message: String::new(), retry_after: None };
            refusal.hint().unwrap_or_default()
        };
        assert!(hint(403, "RequestTimeTooSkewed").contains("clock"));
        assert!(hint(403, "SignatureDoesNotMatch").contains("access_key_id"));
        assert!(hint(400, "ExpiredToken").contains("session_token"));
        assert!(hint(403, "AccessDenied").contains("Allow"));
        assert!(hint(404, "NoSuchBucket").contains("bucket"));
        assert!(hint(301, "").contains("region"));
        assert_eq!(hint(500, "InternalError"), "");
    }

    proptest! {
        #[test]
        fn any_answer_is_read_and_little_of_it_passed_on(
            body: Vec<u8>, wait in ".{0,22}", seconds: u64, message in "[^<]{0,400}", cut: usize,
        ) {
            let _ = Refusal::parse(500, Some(&wait), &body);
            let said = format!("<Error><Code>SlowDown</Code><Message>{message}</Message></Error>");
            let refusal = Refusal::parse(503, Some(&seconds.to_string()), said.as_bytes());
            prop_assert_eq!(&refusal.code, "SlowDown");
            prop_assert_eq!(refusal.retry_after, Some(Duration::from_secs(seconds)));
            prop_assert!(refusal.message.chars().count() <= MESSAGE_CHARACTERS_MAX);
            prop_assert!(!refusal.to_string().contains(char::is_control));
            let _ = Refusal::parse(503, None, &said.as_bytes()[..cut % said.len()]);
        }
    }
}
