//! Between `wal fetch` and its prefetcher: a name and an open file go in; signs of life and one answer come out.
//!
//! Files travel as descriptors, so that whoever asks keeps the name: a prefetcher that was given up on and wakes
//! again writes into a file that nobody looks at. What it had written before it was asked comes back with the answer,
//! as a file without a name, and then it has nothing more to do with it. The asking side is blocking and without a
//! runtime, because a fetch is over in milliseconds. Both ends see to it that the other is the same user. Whatever does
//! not look like an answer is none: the caller does the work itself.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, getsockopt, recvmsg, sendmsg, sockopt,
};
use serde::{Deserialize, Serialize};

use crate::control::{Error, LINE_BYTES_MAX};

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRequest {
    /// The file, as PostgreSQL names it.
    pub name: String,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileReply {
    /// All of it is in the file that was handed over.
    Written { bytes: u64 },
    /// All of it is in a file that comes along, which has no name and is nobody else's.
    Enclosed { bytes: u64 },
    /// The archive has none, and recovery may go by that.
    Absent,
    /// It cannot tell, whoever else may.
    CannotTell,
}

/// An answer that was received.
#[derive(Debug)]
pub struct FileAnswer {
    /// What was said.
    pub reply: FileReply,
    /// The file that came along.
    pub file: Option<File>,
}

/// A request that was received.
#[derive(Debug)]
pub struct FileAsk {
    /// What is asked.
    pub request: FileRequest,
    /// Where it is to be written.
    pub file: File,
    stream: UnixStream,
}

/// A sign of life comes this often,
pub const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// and who has not given one for this long is given up on.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// A request is sent whole right after the connection was made.
const REQUEST_WAIT: Duration = Duration::from_secs(1);

/// Asks whoever listens at `path` for a file, to be written into `file`; gives up after so many signs of life.
///
/// # Errors
/// Where nobody listens, or nothing that can be relied on was said: then nothing is known of the file.
pub fn ask_for_file(
    path: &Path,
    request: &FileRequest,
    file: BorrowedFd<'_>,
    signs_max: u64,
) -> Result<FileAnswer, Error> {
    let failed = |source: io::Error| Error::Io { path: path.to_owned(), source };
    let stream = through_its_folder(path, |path| UnixStream::connect(path))
        .map_err(|source| Error::NotRunning { path: path.to_owned(), source })?;
    stream.set_read_timeout(Some(SILENCE_MAX)).map_err(failed)?;
    stream.set_write_timeout(Some(SILENCE_MAX)).map_err(failed)?;
    check_peer(&stream).map_err(failed)?;
    let malformed = |detail: String| Error::Malformed { path: path.to_owned(), detail };
    let mut line = serde_json::to_vec(request).map_err(|error| malformed(error.to_string()))?;
    line.push(b'\n');
    send_with_file(&stream, &line, file).map_err(failed)?;
    let mut lines = Lines { stream: &stream, received: Vec::new(), file: None };
    for _ in 0..signs_max {
        let answer = lines.next_line().map_err(failed)?;
        if !answer.is_empty() {
            let reply = serde_json::from_slice(&answer).map_err(|error| malformed(error.to_string()))?;
            return Ok(FileAnswer { reply, file: lines.file.map(File::from) });
        }
    }
    Err(failed(io::ErrorKind::TimedOut.into()))
}

/// Listens at `path`, where nothing is.
pub fn listen_for_files(path: &Path) -> Result<UnixListener, Error> {
    let failed = |source| Error::Io { path: path.to_owned(), source };
    let listener = through_its_folder(path, |path| UnixListener::bind(path)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

impl FileAsk {
    /// Receives the request of a connection that was accepted, which it may take a moment to wait for.
    pub fn receive(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(REQUEST_WAIT))?;
        stream.set_write_timeout(Some(SILENCE_MAX))?;
        check_peer(&stream)?;
        let mut line = vec![0; LINE_BYTES_MAX as usize];
        let (length, file) = receive_with_file(&stream, &mut line)?;
        line.truncate(length);
        if line.last() != Some(&b'\n') {
            let mut rest = Vec::new();
            BufReader::new(&stream).take(LINE_BYTES_MAX).read_until(b'\n', &mut rest)?;
            line.extend(rest);
        }
        let request = serde_json::from_slice(&line).map_err(io::Error::other)?;
        let file = file.ok_or_else(|| io::Error::other("no file came along"))?;
        Ok(Self { request, file: file.into(), stream })
    }

    /// Tells that the answer is being worked on.
    ///
    /// # Errors
    /// Where nobody waits for it any more.
    pub fn sign_of_life(&self) -> io::Result<()> {
        (&self.stream).write_all(b"\n")
    }

    /// Answers; who has gone away does not hear it.
    pub fn answer(self, reply: &FileReply) {
        let Ok(mut line) = serde_json::to_vec(reply) else { return };
        line.push(b'\n');
        let _ = (&self.stream).write_all(&line);
    }

    /// Answers with a file that has all that was asked for, and is not kept here.
    pub fn answer_with(self, file: File) {
        let Ok(bytes) = file.metadata().map(|found| found.len()) else { return };
        let Ok(mut line) = serde_json::to_vec(&FileReply::Enclosed { bytes }) else { return };
        line.push(b'\n');
        let _ = send_with_file(&self.stream, &line, file.as_fd());
    }

    /// Says these bytes, whatever they mean.
    #[cfg(test)]
    pub(crate) fn say(self, bytes: &[u8]) {
        (&self.stream).write_all(bytes).unwrap();
    }
}

/// What comes over a connection line by line, and the last file that came along.
struct Lines<'a> {
    stream: &'a UnixStream,
    received: Vec<u8>,
    file: Option<OwnedFd>,
}

impl Lines<'_> {
    /// Returns the next line, without its end.
    fn next_line(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let behind = self.received.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.received, behind);
                line.pop();
                return Ok(line);
            }
            if self.received.len() as u64 >= LINE_BYTES_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut bytes = [0; 512];
            match receive_with_file(self.stream, &mut bytes) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((length, file)) => {
                    self.received.extend_from_slice(&bytes[..length]);
                    self.file = file.or(self.file.take());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Sends a line, and a descriptor along.
fn send_with_file(mut stream: &UnixStream, line: &[u8], file: BorrowedFd<'_>) -> io::Result<()> {
    let descriptors = [file.as_raw_fd()];
    let along = [ControlMessage::ScmRights(&descriptors)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    let sent = sendmsg::<UnixAddr>(stream.as_raw_fd(), &[IoSlice::new(line)], &along, flags, None)?;
    stream.write_all(&line[sent..])
}

/// Receives bytes, and the one descriptor that came along.
fn receive_with_file(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut received = Vec::new();
    for along in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = along {
            received.extend(descriptors.into_iter().map(own));
        }
    }
    Ok((message.bytes, received.pop()))
}

#[expect(unsafe_code, reason = "a received descriptor is a bare number until somebody owns it")]
fn own(descriptor: RawFd) -> OwnedFd {
    // SAFETY: recvmsg has just put it into this process, and nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Refuses another user: what it says would be believed, or what it asks would be read with our keys.
fn check_peer(stream: &UnixStream) -> io::Result<()> {
    let peer = getsockopt(stream, sockopt::PeerCredentials)?;
    let own = nix::unistd::geteuid().as_raw();
    if peer.uid() == own { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

/// Calls `act` with a short name for `path`: a socket's may have 107 bytes, and folders are deeper than that.
fn through_its_folder<T>(path: &Path, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let folder = File::open(folder)?;
    act(&PathBuf::from(format!("/proc/self/fd/{}", folder.as_fd().as_raw_fd())).join(name))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn ask(path: &Path, target: &File) -> Result<FileReply, Error> {
        let answer = ask_for_file(path, &FileRequest { name: "x".into() }, target.as_fd(), 3)?;
        assert!(answer.file.is_none());
        Ok(answer.reply)
    }

    /// Accepts one connection on another thread and does something with it.
    fn answer_once(
        path: &Path,
        act: impl FnOnce(UnixStream) + Send + 'static,
    ) -> std::thread::JoinHandle<()> {
        let listener = listen_for_files(path).unwrap();
        listener.set_nonblocking(false).unwrap();
        std::thread::spawn(move || act(listener.accept().unwrap().0))
    }

    #[test]
    fn a_file_is_written_by_the_other_side_under_a_deep_folder() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("deep".repeat(30));
        fs::create_dir(&folder).unwrap();
        let path = folder.join("x.sock");
        let target = File::create(folder.join("target")).unwrap();
        assert!(matches!(ask(&path, &target), Err(Error::NotRunning { .. })));
        let server = answer_once(&path, |stream| {
            let mut ask = FileAsk::receive(stream).unwrap();
            assert_eq!(ask.request, FileRequest { name: "x".into() });
            ask.sign_of_life().unwrap();
            ask.file.write_all(b"content").unwrap();
            ask.answer(&FileReply::Written { bytes: 7 });
        });
        assert_eq!(ask(&path, &target).unwrap(), FileReply::Written { bytes: 7 });
        server.join().unwrap();
        assert_eq!(fs::read(folder.join("target")).unwrap(), b"content");
    }

    #[test]
    fn a_file_comes_back_with_the_answer() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("x.sock");
        let target = File::create(scratch.path().join("target")).unwrap();
        let mut ready = File::create_new(scratch.path().join("ready")).unwrap();
        ready.write_all(b"content").unwrap();
        let server = answer_once(&path, |stream| {
            let ask = FileAsk::receive(stream).unwrap();
            ask.sign_of_life().unwrap();
            ask.answer_with(ready);
        });
        let request = FileRequest { name: "x".into() };
        let FileAnswer { reply, file } = ask_for_file(&path, &request, target.as_fd(), 3).unwrap();
        server.join().unwrap();
        assert_eq!(reply, FileReply::Enclosed { bytes: 7 });
        assert_eq!(file.unwrap().metadata().unwrap().len(), 7);
        assert_eq!(target.metadata().unwrap().len(), 0);
    }

    #[test]
    fn whatever_is_no_answer_is_an_error() {
        let scratch = tempfile::tempdir().unwrap();
        let target = File::create(scratch.path().join("target")).unwrap();
        let said: [(&str, &[u8]); 6] = [
            ("nothing", b""),
            ("half an answer", b"\"abs"),
            ("an answer cut before its end", b"\"absent\""),
            ("another language", b"{\"present\":1}\n"),
            ("bytes", b"\xff\xfe\n"),
            ("signs of life without end", b"\n\n\n\n\n\n"),
        ];
        for (what, bytes) in said {
            let path = scratch.path().join(format!("{}.sock", bytes.len()));
            let server = answer_once(&path, move |stream| {
                let ask = FileAsk::receive(stream).unwrap();
                ask.say(bytes);
            });
            assert!(ask(&path, &target).is_err(), "{what}");
            server.join().unwrap();
        }
    }

    #[test]
    fn a_request_without_a_file_is_refused() {
        let (near, far) = UnixStream::pair().unwrap();
        (&near).write_all(b"{\"name\":\"x\"}\n").unwrap();
        assert!(FileAsk::receive(far).unwrap_err().to_string().contains("no file"));
    }
}
