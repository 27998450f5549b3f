//! What an S3 store answered, in the words of `storage::Error`.
//!
//! Two rules are kept here. Only a 404 whose code is `NoSuchKey` proves an absence: a missing bucket, a
//! proxy's or another server's 404 does not. And a create has failed for sure only if the store refused it
//! or was never reached; whatever else went wrong after it was sent leaves the outcome unknown.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use object_store::client::{HttpError, HttpErrorKind};

use super::super::error::{Error, Source, Verb};
use super::super::refusal::{Refusal, Unheard, find, is_about_a_certificate};
use super::credentials::NoCredentials;
use super::http::is_silence;

/// Where a store is, as its messages name it.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// The bucket.
    pub(super) bucket: String,
    /// The address of the store; AWS if absent.
    pub(super) endpoint: Option<String>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bucket {} at {}", self.bucket, self.endpoint.as_deref().unwrap_or("AWS"))
    }
}

/// A refusal of a request that was signed with a key.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub(super) struct Signed {
    /// The name of the key.
    pub(super) key_id: String,
    /// What the store said.
    pub(super) source: Refusal,
}

impl Signed {
    /// Says whether temporary credentials have expired, in the words of AWS and of MinIO.
    pub(super) fn is_about_the_token(&self) -> bool {
        let codes = ["ExpiredToken", "TokenRefreshRequired", "InvalidToken", "InvalidTokenId"];
        codes.contains(&self.source.code.as_str())
    }
}

/// What was heard from a place.
#[derive(Debug, thiserror::Error)]
#[error("{place}")]
struct Heard {
    place: Place,
    source: Source,
}

/// How a conversation over HTTP ended, in words: object_store and reqwest say each thing several times.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Broken(String);

/// Joins an error and its sources, each said once.
fn words(error: &HttpError) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !words.contains(&more) {
            words = format!("{words}: {more}");
        }
        source = error.source();
    }
    words
}

/// Translates an error of object_store.
pub(super) fn error_of(verb: Verb, key: &str, place: &Place, error: object_store::Error) -> Error {
    if let Some(refusal) = find::<Refusal>(&error) {
        return refused(verb, key, place, refusal.clone());
    }
    if let Some(none) = find::<NoCredentials>(&error).cloned() {
        return unsigned(verb, key, place, none);
    }
    if is_about_a_certificate(&error) {
        return Error::Invalid {
            key: key.to_owned(),
            reason: format!("could not {verb} {key} in {place}: the store's certificate is not trusted"),
            source: Some(Arc::new(error)),
        };
    }
    let connected = find::<HttpError>(&error).map(HttpError::kind);
    let key = key.to_owned();
    let heard: Source = match find::<HttpError>(&error) {
        Some(error) if is_silence(error) => Arc::new(Unheard(words(error))),
        Some(error) => Arc::new(Broken(words(error))),
        None => Arc::new(error),
    };
    let source: Source = Arc::new(Heard { place: place.clone(), source: heard });
    match connected {
        Some(HttpErrorKind::Connect) => Error::Unreachable { verb, key, reason: None, source: Some(source) },
        _ if verb == Verb::Create => Error::OutcomeUnknown { key, source: Some(source) },
        Some(_) => Error::Unreachable { verb, key, reason: None, source: Some(source) },
        None => Error::Other { verb, key, source },
    }
}

/// Says that a request was refused before anything was done, and may succeed when it is signed anew.
pub(super) fn not_begun(verb: Verb, key: &str, place: &Place, error: object_store::Error) -> Error {
    let heard: Source = match find::<Refusal>(&error) {
        Some(refusal) => Arc::new(refusal.clone()),
        None => Arc::new(error),
    };
    let source: Source = Arc::new(Heard { place: place.clone(), source: heard });
    Error::Unreachable { verb, key: key.to_owned(), reason: None, source: Some(source) }
}

/// Says that a request could not be signed; nothing was sent.
fn unsigned(verb: Verb, key: &str, place: &Place, none: NoCredentials) -> Error {
    let key = key.to_owned();
    if none.is_retryable() {
        let source: Source = Arc::new(Heard { place: place.clone(), source: Arc::new(none) });
        return Error::Unreachable { verb, key, reason: None, source: Some(source) };
    }
    let reason = format!("could not {verb} {key} in {place}: {none}");
    Error::Invalid { key, reason, source: Some(Arc::new(none)) }
}

/// Says that a store does not speak the protocol as we know it.
pub(super) fn protocol(verb: Verb, key: &str, what: &'static str) -> Error {
    Error::Other { verb, key: key.to_owned(), source: Arc::new(Protocol(what)) }
}

#[derive(Debug, thiserror::Error)]
#[error("the store does not keep to the protocol: {0}")]
struct Protocol(&'static str);

/// Says whether a range was refused because the object ends before it.
pub(super) fn is_past_the_end(error: &object_store::Error) -> bool {
    find::<Refusal>(error).is_some_and(|refusal| refusal.status == 416)
}

/// Says whether something was not found, whatever it was.
pub(super) fn is_missing(error: &object_store::Error) -> bool {
    find::<Refusal>(error).is_some_and(|refusal| refusal.status == 404)
}

fn refused(verb: Verb, key: &str, place: &Place, refusal: Refusal) -> Error {
    let named = key.to_owned();
    let because = |refusal| -> Source { Arc::new(Heard { place: place.clone(), source: Arc::new(refusal) }) };
    let invalid = |reason: &str, refusal| Error::Invalid {
        key: key.to_owned(),
        reason: format!("could not {verb} {key}: {place} {reason}"),
        source: Some(because(refusal)),
    };
    match (refusal.status, refusal.code.as_str()) {
        (404, "NoSuchKey") => Error::NotFound { key: named },
        (404, "NoSuchBucket") => invalid("does not exist", refusal),
        (412, _) if verb == Verb::Create => Error::AlreadyExists { key: named },
        // Another create of the key is under way; which one wins is not decided.
        (409, _) if verb == Verb::Create => {
            Error::OutcomeUnknown { key: named, source: Some(because(refusal)) }
        }
        (507, _) | (_, "QuotaExceeded" | "XMinioStorageFull") => {
            Error::Full { verb, key: named, source: Some(because(refusal)) }
        }
        (401 | 403, _) | (400, "ExpiredToken" | "InvalidToken") => {
            Error::Denied { verb, key: named, source: Some(because(refusal)) }
        }
        (301 | 307 | 308, _)
        | (400, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => {
            invalid("lies in another region or at another endpoint", refusal)
        }
        (501, _) => Error::Other { verb, key: named, source: because(refusal) },
        // What came was not what was sent and signed: nothing was created, and the next attempt may come whole.
        (400, "BadDigest" | "IncompleteBody" | "XAmzContentSHA256Mismatch") => {
            Error::Unreachable { verb, key: named, reason: None, source: Some(because(refusal)) }
        }
        (408 | 429 | 500.., _) | (_, "RequestTimeout" | "SlowDown") => match verb {
            Verb::Create => Error::OutcomeUnknown { key: named, source: Some(because(refusal)) },
            _ => Error::Unreachable { verb, key: named, reason: None, source: Some(because(refusal)) },
        },
        _ => Error::Other { verb, key: named, source: because(refusal) },
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::error::ErrorKind;
    use super::*;

    fn kind(verb: Verb, status: u16, code: &str) -> ErrorKind {
        refused(verb, "a/b", &place(), refusal(status, code)).kind()
    }

    fn place() -> Place {
        Place { bucket: "backups".to_owned(), endpoint: Some("https://s3.example.org".to_owned()) }
    }

    fn refusal(status: u16, code: &str) -> Refusal {
        Refusal { status, code: code.to_owned(), message: String::new(), retry_after: None }
    }

    #[test]
    fn only_a_missing_key_is_an_absence() {
        assert_eq!(kind(Verb::Get, 404, "NoSuchKey"), ErrorKind::NotFound);
        assert_eq!(kind(Verb::Get, 404, "NoSuchBucket"), ErrorKind::Invalid);
        assert_eq!(kind(Verb::Get, 404, ""), ErrorKind::Other, "a 404 that is not the store's");
        assert_eq!(kind(Verb::Get, 403, "AccessDenied"), ErrorKind::Denied);
    }

    #[test]
    fn a_create_fails_for_sure_only_when_refused() {
        assert_eq!(kind(Verb::Create, 412, "PreconditionFailed"), ErrorKind::AlreadyExists);
        assert_eq!(kind(Verb::Create, 409, "ConditionalRequestConflict"), ErrorKind::OutcomeUnknown);
        for status in [408, 429, 500, 502, 503, 504] {
            assert_eq!(kind(Verb::Create, status, ""), ErrorKind::OutcomeUnknown, "{status}");
            assert_eq!(kind(Verb::Get, status, ""), ErrorKind::Unreachable, "{status}");
        }
        assert_eq!(kind(Verb::Create, 400, "RequestTimeout"), ErrorKind::OutcomeUnknown);
        assert_eq!(kind(Verb::Create, 400, "InvalidArgument"), ErrorKind::Other);
        assert_eq!(kind(Verb::Create, 501, "NotImplemented"), ErrorKind::Other);
        assert_eq!(kind(Verb::Create, 507, "XMinioStorageFull"), ErrorKind::Full);
        assert_eq!(kind(Verb::Create, 403, "QuotaExceeded"), ErrorKind::Full);
        assert_eq!(kind(Verb::Create, 301, "PermanentRedirect"), ErrorKind::Invalid);
    }
    #[test]
    fn what_does_not_fit_the_configuration_is_not_tried_again() {
        assert_eq!(kind(Verb::Get, 400, "AuthorizationHeaderMalformed"), ErrorKind::Invalid);
        assert_eq!(kind(Verb::Get, 400, "ExpiredToken"), ErrorKind::Denied);
        assert_eq!(kind(Verb::Create, 403, "RequestTimeTooSkewed"), ErrorKind::Denied);
    }

    #[test]
    fn a_body_that_came_changed_is_sent_again_and_was_not_stored() {
        for code in ["BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"] {
            assert_eq!(kind(Verb::Create, 400, code), ErrorKind::Unreachable, "{code}");
        }
    }

    #[test]
    fn who_refused_is_named_and_what_helps() {
        let error = refused(Verb::List, "main", &place(), refusal(403, "SignatureDoesNotMatch"));
        let heard = StdError::source(&error).unwrap();
        assert_eq!(heard.to_string(), "bucket backups at https://s3.example.org");
        assert!(error.hint().unwrap().contains("access_key_id"), "{error:?}");
        let missing = refused(Verb::List, "main", &place(), refusal(404, "NoSuchBucket"));
        assert_eq!(
            missing.to_string(),
            "could not list main: bucket backups at https://s3.example.org does not exist"
        );
    }
}
