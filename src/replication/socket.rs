//! Opens the byte stream to a server, over TCP or a Unix socket.
//!
//! The kernel notes for peer authentication who connects at the moment of `connect`, from the credentials of the
//! calling thread. So root can speak to a peer-authenticated cluster as its owner: a thread of its own takes that user's
//! identity, connects, and ends. Linux keeps identities per thread; it is only glibc's wrappers that change all threads
//! at once, which is why the system calls are made bare here.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream as BlockingUnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio::sync::oneshot;

use super::settings::{Address, Keepalive};

/// How long a full backlog of a local server is waited for; `connect` on a Unix socket knows no other bound.
const BACKLOG_TIMEOUT: Duration = Duration::from_secs(20);
/// "Leave this id as it is", for setresuid(2).
const UNCHANGED: libc::c_long = -1;

/// Connects over TCP, trying every address the name has.
pub(super) async fn connect_tcp(address: &Address, keepalive: Keepalive) -> io::Result<TcpStream> {
    let Address::Tcp { host, at, port } = address else {
        return Err(io::Error::other("a socket path is no TCP address"));
    };
    let candidates: Vec<SocketAddr> = match at {
        Some(at) => vec![SocketAddr::new(*at, *port)],
        None => lookup_host((host.as_str(), *port)).await?.collect(),
    };
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    for candidate in candidates {
        match TcpStream::connect(candidate).await {
            Ok(stream) => {
                prepare_tcp(&stream, keepalive)?;
                return Ok(stream);
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn prepare_tcp(stream: &TcpStream, keepalive: Keepalive) -> io::Result<()> {
    stream.set_nodelay(true)?;
    if !keepalive.enabled {
        return Ok(());
    }
    let seconds = |duration: Duration| u32::try_from(duration.as_secs()).unwrap_or(u32::MAX).max(1);
    let milliseconds = u32::try_from(keepalive.user_timeout.as_millis()).unwrap_or(u32::MAX);
    socket::setsockopt(stream, sockopt::KeepAlive, &true)?;
    socket::setsockopt(stream, sockopt::TcpKeepIdle, &seconds(keepalive.idle))?;
    socket::setsockopt(stream, sockopt::TcpKeepInterval, &seconds(keepalive.interval))?;
    socket::setsockopt(stream, sockopt::TcpKeepCount, &keepalive.count)?;
    socket::setsockopt(stream, sockopt::TcpUserTimeout, &milliseconds)?;
    Ok(())
}

/// Connects to a Unix socket, as user `uid` where one is given (which takes root).
pub(super) async fn connect_unix(path: &Path, uid: Option<u32>) -> io::Result<UnixStream> {
    let path = path.to_owned();
    let (sender, receiver) = oneshot::channel();
    // A thread of its own, never one of a pool: should anything go wrong, the borrowed identity dies with it.
    std::thread::Builder::new().name("connect".into()).spawn(move || {
        let connected = match uid {
            Some(uid) => become_user(uid).and_then(|()| connect_blocking(&path)),
            None => connect_blocking(&path),
        };
        // The receiver is gone when the caller gave up; the socket is closed by the drop.
        let _ = sender.send(connected);
    })?;
    let stream = receiver.await.map_err(|_| io::Error::other("the connecting thread ended early"))??;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Returns who owns a socket: the user its server runs as.
pub(super) fn owner(path: &Path) -> Option<u32> {
    std::fs::metadata(path).ok().map(|metadata| metadata.uid())
}

fn connect_blocking(path: &Path) -> io::Result<BlockingUnixStream> {
    let fd: OwnedFd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::setsockopt(
        &fd,
        sockopt::SendTimeout,
        &TimeVal::milliseconds(BACKLOG_TIMEOUT.as_millis() as i64),
    )?;
    socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::setsockopt(&fd, sockopt::SendTimeout, &TimeVal::milliseconds(0))?;
    Ok(BlockingUnixStream::from(fd))
}

/// Gives the calling thread, and no other, the effective user `uid`.
#[allow(unsafe_code, reason = "glibc's seteuid would change every thread of the process")]
fn become_user(uid: u32) -> io::Result<()> {
    // SAFETY: the call takes three numbers and changes nothing but the calling thread's credentials.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, UNCHANGED, libc::c_long::from(uid), UNCHANGED) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use nix::unistd::geteuid;

    use super::*;

    #[tokio::test]
    async fn a_server_sees_the_user_that_was_asked_for_and_the_process_stays_who_it_is() {
        let scratch = tempfile::tempdir().unwrap();
        std::fs::set_permissions(scratch.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = scratch.path().join("s");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        let me = geteuid().as_raw();
        // Only root can be somebody else; anybody can be asked to be oneself.
        let wanted = if me == 0 { 65534 } else { me };
        for (uid, seen) in [(Some(wanted), wanted), (None, me)] {
            let _client = connect_unix(&path, uid).await.unwrap();
            let (server, _) = listener.accept().await.unwrap();
            assert_eq!(server.peer_cred().unwrap().uid(), seen);
            assert_eq!(geteuid().as_raw(), me);
        }
    }

    #[tokio::test]
    async fn a_missing_socket_is_not_found() {
        let error = connect_unix(Path::new("/nonexistent/.s.PGSQL.1"), None).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
