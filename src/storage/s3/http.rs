//! HTTP as object_store uses it, with bounds on how long and how much is listened.
//!
//! object_store calls [`Connector`] for its client. What it gets waits for an answer no longer than
//! `read_timeout` and what the request's own bytes may take, and turns every answer that is no success into
//! a [`Refusal`] with the status and the code the store gave: object_store would keep only some of them.
//! The pieces of an object's body are timed by whoever reads them.
//!
//! No redirect is followed: a signature is good for one host.

use std::time::Duration;

use async_trait::async_trait;
use bytes::BytesMut;
use futures::StreamExt;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody,
    HttpService,
};

use super::super::refusal::{Refusal, find};
use super::super::retry::BYTES_PER_SECOND_MIN;
use super::answer::Signed;

/// The most of a refusal's body that is read.
const REFUSAL_BYTES_MAX: usize = 64 * 1024;

/// The most of one page of a listing: a thousand of the longest keys with all that is said of each.
const LISTING_BYTES_MAX: usize = 16 * 1024 * 1024;

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

/// Says whether a request came to its end without a byte of an answer: nobody was there, or nobody spoke.
pub(super) fn is_silence(error: &HttpError) -> bool {
    let unanswered = || matches!(find(error), Some(Listening::NoAnswer(_)));
    error.kind() == HttpErrorKind::Connect || unanswered()
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

/// Returns the name of the key that a request is signed with; empty where it is not.
fn key_id_of(request: &HttpRequest) -> String {
    let signed = request.headers().get("authorization").and_then(|value| value.to_str().ok());
    let scope = signed.and_then(|text| text.split_once("Credential=")).map(|(_, rest)| rest);
    scope.and_then(|scope| scope.split('/').next()).unwrap_or_default().to_owned()
}

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Connector {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let key_id = key_id_of(&request);
        let listing = request.uri().query().is_some_and(|query| query.contains("list-type=2"));
        let answer = self.answer(request).await?;
        let status = answer.status();
        if !status.is_success() {
            let retry_after = answer.headers().get("retry-after").and_then(|value| value.to_str().ok());
            let retry_after = retry_after.map(str::to_owned);
            let body = match self.read(answer.into_body(), REFUSAL_BYTES_MAX).await {
                Ok(body) => body,
                // What these mean, the code in the body says: a 404 without it proves nothing.
                Err(error) if matches!(status.as_u16(), 400 | 404) => return Err(error),
                Err(_) => BytesMut::new(),
            };
            let source = Refusal::parse(status.as_u16(), retry_after.as_deref(), &body);
            return Err(HttpError::new(HttpErrorKind::Decode, Signed { key_id, source }));
        }
        if !listing {
            return Ok(answer);
        }
        let (parts, body) = answer.into_parts();
        let body = self.read(body, LISTING_BYTES_MAX).await?.freeze();
        Ok(HttpResponse::from_parts(parts, body.into()))
    }
}
