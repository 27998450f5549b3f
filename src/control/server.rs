//! Takes requests one after the other and hands them to the process that listens.
//!
//! The socket stands in a folder of mode 0700, which is all the protection it needs; a file that a killed process
//! left at its place is replaced, because the folder's lock has told that nobody else is alive.

use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use crate::control::messages::Request;
use crate::control::{Error, LINE_BYTES_MAX};

/// A client that connects and says nothing keeps others waiting no longer than this.
const REQUEST_WAIT: Duration = Duration::from_secs(5);

/// A socket that takes requests of one kind.
#[derive(Debug)]
pub struct Listener<Q = Request> {
    path: PathBuf,
    inner: UnixListener,
    kind: PhantomData<fn() -> Q>,
}

/// A request whose answer is awaited.
#[derive(Debug)]
pub struct Pending<Q = Request> {
    /// What was asked.
    pub request: Q,
    stream: UnixStream,
}

impl<Q: DeserializeOwned> Listener<Q> {
    /// Listens at `path`, replacing what a killed process has left there.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Io { path: path.to_owned(), source };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let inner = UnixListener::bind(path).map_err(failed)?;
        Ok(Self { path: path.to_owned(), inner, kind: PhantomData })
    }

    /// Waits for the next request that is understood.
    pub async fn next(&self) -> Pending<Q> {
        loop {
            let Ok((stream, _)) = self.inner.accept().await else {
                // Out of file descriptors, for example: others will be closed.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let read = tokio::time::timeout(REQUEST_WAIT, read_request(stream)).await;
            match read.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(pending) => return pending,
                Err(error) => {
                    tracing::debug!("a request on {} was not understood: {error}", self.path.display());
                }
            }
        }
    }
}

impl<Q> Drop for Listener<Q> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl<Q> Pending<Q> {
    /// Answers. A client that has gone away does not hear it.
    pub async fn answer(mut self, reply: &impl Serialize) {
        let Ok(mut line) = serde_json::to_vec(reply) else { return };
        line.push(b'\n');
        let _ = self.stream.write_all(&line).await;
        let _ = self.stream.shutdown().await;
    }
}

async fn read_request<Q: DeserializeOwned>(mut stream: UnixStream) -> io::Result<Pending<Q>> {
    let mut line = String::new();
    BufReader::new(&mut stream).take(LINE_BYTES_MAX).read_line(&mut line).await?;
    let request = serde_json::from_str(&line).map_err(io::Error::other)?;
    Ok(Pending { request, stream })
}

#[cfg(test)]
mod tests {
    use crate::control::{self, Reply};

    use super::*;

    #[tokio::test]
    async fn a_request_is_answered_and_a_dead_socket_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("clone.sock");
        assert!(matches!(control::request(&path, &Request::Status).await, Err(Error::NotRunning { .. })));
        std::fs::write(&path, "left by a killed process").unwrap();
        let listener: Listener = Listener::bind(&path).unwrap();
        let (reply, ()) = tokio::join!(control::request(&path, &Request::Stop), async {
            // Somebody who says nothing keeps nobody waiting for ever.
            drop(UnixStream::connect(&path).await.unwrap());
            let pending = listener.next().await;
            assert_eq!(pending.request, Request::Stop);
            pending.answer(&Reply::Done).await;
        });
        assert_eq!(reply.unwrap(), Reply::Done);
        drop(listener);
        assert!(!path.exists());
    }
}
