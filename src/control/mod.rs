//! Messages between Walden's own processes, and the client that sends them.
//!
//! A clone's supervisor, or a restore's, listens on a unix socket in a private folder; whoever may enter it may ask. One
//! JSON line goes in, one comes out, and the connection ends. A daemon's socket is open to every user of the host, and
//! tells who asks. Deliberately absent: anything over a network, and what a request means; the processes that listen
//! know that.

mod client;
mod daemon_client;
mod daemon_messages;
mod daemon_server;
mod file_request;
mod messages;
mod restore_messages;
mod server;

pub use client::{request, request_of_restore};
pub use daemon_client::ask_daemon;
pub use daemon_messages::{ArchivedFile, DaemonAnswer, DaemonRequest, Destination, Failure, PushRequest};
pub use daemon_server::{Caller, DaemonListener};
pub use file_request::{
    FileAnswer, FileAsk, FileReply, FileRequest, SIGN_OF_LIFE, ask_for_file, listen_for_files,
};
pub use messages::{CloneSetting, CloneState, CloneStatus, HydrationState, HydrationStatus, Reply, Request};
pub use restore_messages::{
    RestoreReply, RestoreRequest, RestoreStatus, RestoredServer, RestoredSetting, RestoredTablespace,
};
pub use server::{Listener, Pending};

use std::io;
use std::path::PathBuf;

/// What can go wrong between two of our processes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error("nothing answers at \"{}\": {source}", path.display())]
    NotRunning { path: PathBuf, source: io::Error },
    /// The connection broke, or its line did not end.
    #[error("could not talk to \"{}\": {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// Somebody listens whose word is not taken.
    #[error("\"{}\" belongs to a process of user {uid}, whose word is not taken", path.display())]
    Stranger { path: PathBuf, uid: u32 },
    /// The other side speaks another release's language.
    #[error("\"{}\" answered something that is not understood: {detail}", path.display())]
    Malformed { path: PathBuf, detail: String },
}

/// No message is longer: states and counters, never data.
const LINE_BYTES_MAX: u64 = 256 << 10;
