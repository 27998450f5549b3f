//! HTTP as object_store uses it, with bounds on how long and how much is listened.
//!
//! object_store calls [`Connector`] for its client. What it gets waits for an answer no longer than
//! `read_timeout` and what the request's own bytes may take, and turns every answer that is no success into
//! a [`Refusal`] with the status and the code the store gave: object_store would keep only some of them.
//! The pieces of an object's body are timed by whoever reads them.
//!
//! No redirect is followed: a signature is good for one host.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use bytes::BytesMut;
use futures::StreamExt;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody,
    HttpService,
};

use super::super::retry::BYTES_PER_SECOND_MIN;

/// The most of a refusal's body that is read.
const REFUSAL_BYTES_MAX: usize = 64 * 1024;

/// The most of one page of a listing: a thousand of the longest keys with all that is said of each.
const LISTING_BYTES_MAX: usize = 16 * 1024 * 1024;

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
}

impl Refusal {
    fn parse(status: u16, body: &[u8]) -> Self {
        let body = String::from_utf8_lossy(body);
        Self { status, code: element(&body, "Code"), message: element(&body, "Message") }
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

/// What a store did not say in time, or said too much of.
#[derive(Debug, thiserror::Error)]
enum Listening {
    #[error("no answer within {0:?}")]
    NoAnswer(Duration),
    #[error("nothing for {0:?} in mid-answer")]
    Stalled(Duration),
    #[error("an answer of more than {0} bytes")]
    TooLong(usize),
}

/// Makes the HTTP clients of one store.
#[derive(Debug, Clone)]
pub(super) struct Connector {
    client: reqwest::Client,
    read_timeout: Duration,
}

impl Connector {
    /// Starts the settings of a client.
    pub(super) fn builder(connect_timeout: Duration) -> reqwest::ClientBuilder {
        reqwest::Client::builder()
            .user_agent(concat!("walden/", env!("CARGO_PKG_VERSION")))
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .http1_only()
            .connect_timeout(connect_timeout)
            // Before the idle limits of common load balancers (60 s) close the connection under a request.
            .pool_idle_timeout(Duration::from_secs(45))
    }

    /// Uses a client that was built from those settings.
    pub(super) fn new(client: reqwest::Client, read_timeout: Duration) -> Self {
        Self { client, read_timeout }
    }

    async fn answer(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let transfer = Duration::from_secs(request.body().content_length() as u64 / BYTES_PER_SECOND_MIN);
        let patience = self.read_timeout.saturating_add(transfer);
        match tokio::time::timeout(patience, self.client.call(request)).await {
            Ok(answer) => answer,
            Err(_) => Err(HttpError::new(HttpErrorKind::Timeout, Listening::NoAnswer(patience))),
        }
    }

    async fn read(&self, body: HttpResponseBody, bytes_max: usize) -> Result<BytesMut, HttpError> {
        let mut pieces = body.bytes_stream();
        let mut whole = BytesMut::new();
        loop {
            match tokio::time::timeout(self.read_timeout, pieces.next()).await {
                Ok(None) => return Ok(whole),
                Ok(Some(piece)) => whole.extend_from_slice(&piece?),
                Err(_) => {
                    let stalled = Listening::Stalled(self.read_timeout);
                    return Err(HttpError::new(HttpErrorKind::Timeout, stalled));
                }
            }
            if whole.len() > bytes_max {
                return Err(HttpError::new(HttpErrorKind::Decode, Listening::TooLong(bytes_max)));
            }
        }
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Connector {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let listing = request.uri().query().is_some_and(|query| query.contains("list-type=2"));
        let answer = self.answer(request).await?;
        let status = answer.status();
        if !status.is_success() {
            // The status alone still says much when the body cannot be read to its end.
            let body = self.read(answer.into_body(), REFUSAL_BYTES_MAX).await.unwrap_or_default();
            return Err(HttpError::new(HttpErrorKind::Decode, Refusal::parse(status.as_u16(), &body)));
        }
        if !listing {
            return Ok(answer);
        }
        let (parts, body) = answer.into_parts();
        let body = self.read(body, LISTING_BYTES_MAX).await?.freeze();
        Ok(HttpResponse::from_parts(parts, body.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_read_from_whatever_the_body_is() {
        let body =
            b"<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code><Message>It is\n gone</Message></Error>";
        let refusal = Refusal::parse(404, body);
        assert_eq!((refusal.code.as_str(), refusal.message.as_str()), ("NoSuchKey", "It is gone"));
        assert_eq!(refusal.to_string(), "HTTP status 404: NoSuchKey: It is gone");
        for body in [&b""[..], b"<html>", b"<Code>x", b"</Code><Code>", b"\xff\xfe<Code"] {
            assert_eq!(Refusal::parse(502, body).to_string(), "HTTP status 502");
        }
        let long = format!("<Message>{}</Message>", "x".repeat(5000));
        assert_eq!(Refusal::parse(500, long.as_bytes()).message.len(), MESSAGE_CHARACTERS_MAX);
    }
}
