//! Takes a daemon's callers: who they are, what they ask, and their answer once there is one.
//!
//! Anyone on this host may connect; who may have something done is for the daemon to say, by the user that the kernel
//! vouches for. Each caller is served by a task of its own, so that none waits for another.

use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use crate::control::daemon_messages::{DaemonAnswer, DaemonRequest, SILENCE_MAX, WORKING_EVERY};
use crate::control::{Error, LINE_BYTES_MAX};

/// A daemon's socket; it is removed when dropped.
#[derive(Debug)]
pub struct DaemonListener {
    path: PathBuf,
    inner: UnixListener,
}

/// Somebody who has connected.
#[derive(Debug)]
pub struct Caller {
    /// The user, by the kernel's word.
    pub uid: u32,
    stream: UnixStream,
}

/// How long to wait where no connection can be taken, out of file descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Everybody may connect; the folder of the socket says who gets so far.
const SOCKET_MODE: u32 = 0o666;

impl DaemonListener {
    /// Listens at `path`, replacing what a killed daemon has left there: the caller holds the lock that tells.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Io { path: path.to_owned(), source };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let inner = UnixListener::bind(path).map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE)).map_err(failed)?;
        Ok(Self { path: path.to_owned(), inner })
    }

    /// Waits for the next caller.
    pub async fn accept(&self) -> Caller {
        loop {
            let accepted = self.inner.accept().await;
            match accepted.and_then(|(stream, _)| Ok((stream.peer_cred()?.uid(), stream))) {
                Ok((uid, stream)) => return Caller { uid, stream },
                Err(error) => {
                    tracing::debug!("no connection on {}: {error}", self.path.display());
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl Drop for DaemonListener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Caller {
    /// Reads the request; one that does not come or is not understood is an error.
    pub async fn request(&mut self) -> io::Result<DaemonRequest> {
        let mut line = String::new();
        let mut reader = BufReader::new(&mut self.stream).take(LINE_BYTES_MAX);
        tokio::time::timeout(SILENCE_MAX, reader.read_line(&mut line)).await.map_err(io::Error::from)??;
        serde_json::from_str(&line).map_err(io::Error::other)
    }

    /// Answers once `answer` is there, and says until then that it is being worked on. A caller that has gone away
    /// ends the wait, and nothing else.
    pub async fn answer(mut self, answer: impl Future<Output = DaemonAnswer>) {
        let mut answer = pin!(answer);
        let line = loop {
            match tokio::time::timeout(WORKING_EVERY, &mut answer).await {
                Ok(answer) => break answer,
                Err(_) if self.write(&DaemonAnswer::Working).await.is_err() => return,
                Err(_) => {}
            }
        };
        let _ = self.write(&line).await;
        let _ = self.stream.shutdown().await;
    }

    async fn write(&mut self, answer: &DaemonAnswer) -> io::Result<()> {
        let mut line = serde_json::to_vec(answer).map_err(io::Error::other)?;
        line.push(b'\n');
        // A caller that does not read is stopped, not waited for.
        tokio::time::timeout(SILENCE_MAX, self.stream.write_all(&line)).await.map_err(io::Error::from)?
    }
}

#[cfg(test)]
mod tests {
    use crate::control::{ArchivedFile, Destination, PushRequest, ask_daemon};

    use super::*;

    fn request() -> DaemonRequest {
        let destination = Destination { repository: "main in memory://".to_owned(), recipients: None };
        let (site, path) = ("main".to_owned(), "/data/pg_wal/1".into());
        DaemonRequest::Push(PushRequest { site, path, force: false, destination })
    }

    fn archived() -> DaemonAnswer {
        DaemonAnswer::Archived(ArchivedFile { name: "1".into(), cluster: "c".into(), created: true })
    }

    async fn ask(path: &Path) -> tokio::task::JoinHandle<Result<DaemonAnswer, Error>> {
        let path = path.to_owned();
        tokio::task::spawn_blocking(move || ask_daemon(&path, &request(), || true))
    }

    #[tokio::test]
    async fn a_caller_is_known_by_its_user_and_told_while_it_waits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon.sock");
        std::fs::write(&path, "left by a killed process").unwrap();
        let listener = DaemonListener::bind(&path).unwrap();
        let asked = ask(&path).await;
        let mut caller = listener.accept().await;
        assert_eq!(caller.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(caller.request().await.unwrap(), request());
        let (told, waits) = tokio::sync::oneshot::channel();
        let serving = tokio::spawn(caller.answer(async { waits.await.unwrap() }));
        // Longer than it takes until the caller is told that the daemon is at work.
        tokio::time::sleep(WORKING_EVERY + WORKING_EVERY / 2).await;
        told.send(archived()).unwrap();
        serving.await.unwrap();
        assert_eq!(asked.await.unwrap().unwrap(), archived());
        drop(listener);
        assert!(!path.exists());
        let nobody = ask(&path).await.await.unwrap();
        assert!(matches!(nobody, Err(Error::NotRunning { .. })), "{nobody:?}");
    }

    #[tokio::test]
    async fn a_daemon_that_goes_away_has_not_answered_and_garbage_is_no_request() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon.sock");
        let listener = DaemonListener::bind(&path).unwrap();
        let asked = ask(&path).await;
        let mut caller = listener.accept().await;
        caller.request().await.unwrap();
        drop(caller);
        let outcome = asked.await.unwrap();
        assert!(matches!(outcome, Err(Error::Io { .. })), "{outcome:?}");
        let mut garbage = UnixStream::connect(&path).await.unwrap();
        garbage.write_all(b"{\"stop\":{}}\n").await.unwrap();
        assert!(listener.accept().await.request().await.is_err());
    }
}
