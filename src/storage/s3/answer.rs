//! What an S3 store answered, in the words of `storage::Error`.
//!
//! Two rules are kept here. Only a 404 whose code is `NoSuchKey` proves an absence: a missing bucket, a
//! proxy's or another server's 404 does not. And a create has failed for sure only if the store refused it
//! or was never reached; whatever else went wrong after it was sent leaves the outcome unknown.

use std::error::Error as StdError;
use std::sync::Arc;

use object_store::client::{HttpError, HttpErrorKind};

use super::super::error::{Error, Source, Verb};
use super::http::Refusal;

/// Translates an error of object_store.
pub(super) fn error_of(verb: Verb, key: &str, bucket: &str, error: object_store::Error) -> Error {
    if let Some(refusal) = find::<Refusal>(&error) {
        return refused(verb, key, bucket, refusal.clone());
    }
    if is_about_a_certificate(&error) {
        return Error::Invalid {
            key: key.to_owned(),
            reason: format!("could not {verb} {key}: the store's certificate is not trusted"),
            source: Some(Arc::new(error)),
        };
    }
    let connected = find::<HttpError>(&error).map(HttpError::kind);
    let key = key.to_owned();
    let source: Source = Arc::new(error);
    match connected {
        Some(HttpErrorKind::Connect) => Error::Unreachable { verb, key, reason: None, source: Some(source) },
        _ if verb == Verb::Create => Error::OutcomeUnknown { key, source: Some(source) },
        Some(_) => Error::Unreachable { verb, key, reason: None, source: Some(source) },
        None => Error::Other { verb, key, source },
    }
}

/// Says whether TLS ended over a certificate, which trying again does not change.
fn is_about_a_certificate(error: &(dyn StdError + 'static)) -> bool {
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

fn refused(verb: Verb, key: &str, bucket: &str, refusal: Refusal) -> Error {
    let named = key.to_owned();
    let because = |refusal| Some(Arc::new(refusal) as Source);
    match (refusal.status, refusal.code.as_str()) {
        (404, "NoSuchKey") => Error::NotFound { key: named },
        (404, "NoSuchBucket") => Error::Invalid {
            key: named,
            reason: format!("could not {verb} {key}: bucket {bucket} does not exist"),
            source: because(refusal),
        },
        (412, _) if verb == Verb::Create => Error::AlreadyExists { key: named },
        // Another create of the key is under way; which one wins is not decided.
        (409, _) if verb == Verb::Create => Error::OutcomeUnknown { key: named, source: because(refusal) },
        (507, _) | (_, "QuotaExceeded" | "XMinioStorageFull") => {
            Error::Full { verb, key: named, source: because(refusal) }
        }
        (401 | 403, _) => Error::Denied { verb, key: named, source: because(refusal) },
        (301 | 307 | 308, _) => Error::Invalid {
            key: named,
            reason: format!(
                "could not {verb} {key}: bucket {bucket} lies in another region or at another endpoint"
            ),
            source: because(refusal),
        },
        (501, _) => Error::Other { verb, key: named, source: Arc::new(refusal) },
        (408 | 429 | 500.., _) | (_, "RequestTimeout" | "SlowDown") => match verb {
            Verb::Create => Error::OutcomeUnknown { key: named, source: because(refusal) },
            _ => Error::Unreachable { verb, key: named, reason: None, source: because(refusal) },
        },
        _ => Error::Other { verb, key: named, source: Arc::new(refusal) },
    }
}

/// Finds an error of one type among an error's sources.
fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut current = error;
    loop {
        if let Some(found) = current.downcast_ref() {
            return Some(found);
        }
        current = current.source()?;
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::error::ErrorKind;
    use super::*;

    fn kind(verb: Verb, status: u16, code: &str) -> ErrorKind {
        let refusal = Refusal { status, code: code.to_owned(), message: String::new() };
        refused(verb, "a/b", "bucket", refusal).kind()
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
}
