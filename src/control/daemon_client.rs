//! Asks a daemon and waits for its answer, on this thread and without any runtime.
//!
//! PostgreSQL starts `wal push` for every segment, so this is all that is done before the daemon is reached. A daemon
//! that hangs keeps nobody waiting: neither the connection nor the next line is waited for longer than
//! `SILENCE_MAX`. Whose word is taken: root's, one's own user's, and that of the owner of the socket's folder, who
//! alone can put a socket there.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::control::daemon_messages::{DaemonAnswer, DaemonRequest, SILENCE_MAX};
use crate::control::{Error, LINE_BYTES_MAX};

/// Asks the daemon that listens at `path`, and returns its last word; `waits` is asked every second whether to wait
/// on, and where it does not, that last word is that the daemon is at work.
///
/// # Errors
/// `NotRunning` where nobody listens; with every other error it is not known what became of the request.
pub fn ask_daemon(
    path: &Path,
    request: &DaemonRequest,
    mut waits: impl FnMut() -> bool,
) -> Result<DaemonAnswer, Error> {
    let failed = |source| Error::Io { path: path.to_owned(), source };
    let malformed = |detail: String| Error::Malformed { path: path.to_owned(), detail };
    let mut line = serde_json::to_vec(request).map_err(|error| malformed(error.to_string()))?;
    line.push(b'\n');
    let mut stream =
        connect_within_silence(path).map_err(|source| Error::NotRunning { path: path.to_owned(), source })?;
    check_server(path, &stream)?;
    stream.write_all(&line).map_err(failed)?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        (&mut reader).take(LINE_BYTES_MAX).read_line(&mut line).map_err(failed)?;
        if line.is_empty() {
            return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
        }
        match serde_json::from_str(&line).map_err(|error| malformed(error.to_string()))? {
            DaemonAnswer::Working if waits() => {}
            answer => return Ok(answer),
        }
    }
}

/// Connects; of a daemon that no longer accepts, the kernel keeps callers waiting without an end unless told otherwise.
fn connect_within_silence(path: &Path) -> std::io::Result<UnixStream> {
    let silence = TimeVal::new(SILENCE_MAX.as_secs() as i64, 0);
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::SendTimeout, &silence)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &silence)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(UnixStream::from(socket))
}

fn check_server(path: &Path, stream: &UnixStream) -> Result<(), Error> {
    let failed = |source| Error::Io { path: path.to_owned(), source };
    let server = getsockopt(stream, sockopt::PeerCredentials).map_err(|errno| failed(errno.into()))?.uid();
    let own = nix::unistd::geteuid().as_raw();
    if server == 0 || server == own {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    let folder = std::fs::metadata(folder).map_err(failed)?;
    if server == folder.uid() && folder.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(Error::Stranger { path: path.to_owned(), uid: server })
}
