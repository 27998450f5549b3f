//! Sends one request and waits for its answer.
//! Deliberately absent: a deadline; a stop takes as long as a checkpoint does, and the caller knows how long that is.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::control::messages::{Reply, Request};
use crate::control::restore_messages::{RestoreReply, RestoreRequest};
use crate::control::{Error, LINE_BYTES_MAX};

/// Asks the supervisor of a clone that listens at `path`.
///
/// # Errors
/// `NotRunning` where nobody does.
pub async fn request(path: &Path, request: &Request) -> Result<Reply, Error> {
    ask(path, request).await
}

/// Asks the supervisor of a restore that listens at `path`.
///
/// # Errors
/// `NotRunning` where nobody does.
pub async fn request_of_restore(path: &Path, request: &RestoreRequest) -> Result<RestoreReply, Error> {
    ask(path, request).await
}

async fn ask<Q: Serialize, R: DeserializeOwned>(path: &Path, request: &Q) -> Result<R, Error> {
    let failed = |source| Error::Io { path: path.to_owned(), source };
    let malformed = |detail: String| Error::Malformed { path: path.to_owned(), detail };
    let mut stream = UnixStream::connect(path)
        .await
        .map_err(|source| Error::NotRunning { path: path.to_owned(), source })?;
    let mut line = serde_json::to_vec(request).map_err(|error| malformed(error.to_string()))?;
    line.push(b'\n');
    stream.write_all(&line).await.map_err(failed)?;
    let mut answer = String::new();
    BufReader::new(stream).take(LINE_BYTES_MAX).read_line(&mut answer).await.map_err(failed)?;
    serde_json::from_str(&answer).map_err(|error| malformed(error.to_string()))
}
