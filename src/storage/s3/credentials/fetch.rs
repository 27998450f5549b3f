//! Short questions over HTTP to those who give credentials, with bounds on how long and how much is listened.
//!
//! Two clients: services of the network go by the proxy and trust the certificates of the store's own; agents and the
//! metadata service are on this host or next to it, where no proxy leads.

use std::error::Error as StdError;
use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder};

use super::super::super::refusal::Refusal;
use super::document::shortened;
use super::error::SourceError;

/// The most of an answer that is read: credentials take some 2 kB.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// How long a service of the network is waited for.
const SERVICE_PATIENCE: Duration = Duration::from_secs(10);

/// How long somebody on this host, or next to it, is waited for.
const NEIGHBOUR_PATIENCE: Duration = Duration::from_secs(2);

/// Who asks.
#[derive(Debug, Clone)]
pub(in crate::storage::s3) struct Asker {
    far: Client,
    near: Client,
    far_patience: Duration,
    near_patience: Duration,
}

impl Asker {
    /// Asks services of the network through one client, this host and its neighbours through the other.
    pub(in crate::storage::s3) fn new(far: Client, near: Client) -> Self {
        Self { far, near, far_patience: SERVICE_PATIENCE, near_patience: NEIGHBOUR_PATIENCE }
    }

    /// Prepares a question to a service of the network.
    pub(super) fn far(&self, method: Method, url: &str) -> Question {
        Question { request: self.far.request(method, url), patience: self.far_patience }
    }

    /// Prepares a question to this host or a neighbour.
    pub(super) fn near(&self, method: Method, url: &str) -> Question {
        Question { request: self.near.request(method, url), patience: self.near_patience }
    }

    /// Waits less for everybody.
    #[cfg(test)]
    pub(super) fn waiting(self, patience: Duration) -> Self {
        Self { far_patience: patience, near_patience: patience, ..self }
    }
}

/// A request that is not sent yet.
pub(super) struct Question {
    request: RequestBuilder,
    patience: Duration,
}

impl Question {
    /// Adds a header, whose value fits.
    pub(super) fn header(self, name: &'static str, value: &str) -> Self {
        Self { request: self.request.header(name, value), ..self }
    }

    /// Adds a body.
    pub(super) fn body(self, body: String) -> Self {
        Self { request: self.request.body(body), ..self }
    }

    /// Sends it and returns the body of a success; every other answer is an error by its status.
    pub(super) async fn ask(self) -> Result<Vec<u8>, SourceError> {
        let patience = self.patience;
        let answered = async {
            let mut answer = self.request.send().await.map_err(|error| unheard(&error))?;
            let mut body = Vec::new();
            while let Some(piece) = answer.chunk().await.map_err(|error| unheard(&error))? {
                if body.len() + piece.len() > ANSWER_BYTES_MAX {
                    return Err(SourceError::Refused(format!(
                        "it answers more than {ANSWER_BYTES_MAX} bytes"
                    )));
                }
                body.extend_from_slice(&piece);
            }
            Ok((answer.status().as_u16(), body))
        };
        let (status, body) = match tokio::time::timeout(patience, answered).await {
            Ok(answered) => answered?,
            Err(_) => return Err(SourceError::Unreachable(format!("no answer within {patience:?}"))),
        };
        match status {
            200..300 => Ok(body),
            404 => Err(SourceError::Absent(refusal(status, &body))),
            408 | 429 | 500.. => Err(SourceError::Unreachable(refusal(status, &body))),
            _ => Err(SourceError::Refused(refusal(status, &body))),
        }
    }
}

/// Quotes a refusal: the words of AWS's XML, or what else the body says.
fn refusal(status: u16, body: &[u8]) -> String {
    let refusal = Refusal::parse(status, None, body);
    let text = String::from_utf8_lossy(body);
    match (refusal.code.is_empty(), shortened(text.trim())) {
        (true, said) if !said.is_empty() => format!("{refusal}: {said}"),
        _ => refusal.to_string(),
    }
}

/// Says why nothing was heard, each cause once.
fn unheard(error: &reqwest::Error) -> SourceError {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !words.contains(&more) {
            words = format!("{words}: {more}");
        }
        cause = error.source();
    }
    SourceError::Unreachable(words)
}
