//! A line to a PostgreSQL server that can fall silent: its host takes every byte, and no answer comes.
//!
//! So is a server that hangs on its disk or is stopped. Connections are neither refused nor closed for that, and keepalive
//! packets are answered. What goes by is understood as far as the end of the login, without TLS.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::Sql;

/// Whose answers are held back.
#[derive(Debug, Default)]
struct Silence {
    /// Of sessions for statements, once they have logged in.
    sessions: bool,
    /// Of replication connections, once a stream was asked for.
    streams: bool,
    /// Of all that have logged in.
    everybody: bool,
    /// Of those that were made before so many others.
    made_before: usize,
    /// Connections that were made.
    made: usize,
    /// How often a connection had an answer held back that it waited for.
    held: usize,
}

/// A running line; it ends with the process, as a test has its own.
#[derive(Debug)]
pub struct Line {
    address: SocketAddr,
    database: String,
    user: String,
    silence: Arc<Mutex<Silence>>,
}

impl Line {
    /// Starts a line to a server that everybody may log in to.
    pub fn to(server: &Sql) -> Self {
        let socket = server.host.join(format!(".s.PGSQL.{}", server.port));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let silence = Arc::<Mutex<Silence>>::default();
        let shared = silence.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (socket, silence) = (socket.clone(), shared.clone());
                // A server that is not there closes the connection, which is all a client would see of it.
                thread::spawn(move || carry(client, socket, &silence));
            }
        });
        Self { address, database: server.database.clone(), user: server.user.clone(), silence }
    }

    /// Returns the connection over this line in libpq's syntax.
    pub fn connection(&self) -> String {
        let Self { address, user, database, .. } = self;
        let (host, port) = (address.ip(), address.port());
        format!("host={host} port={port} user={user} dbname={database} sslmode=disable")
    }

    /// Holds answers to statements back from now on, and lets replication connections be.
    pub fn silence_sessions(&self) {
        self.silence.lock().unwrap().sessions = true;
    }

    /// Holds back what comes of START_REPLICATION from now on.
    pub fn silence_streams(&self) {
        self.silence.lock().unwrap().streams = true;
    }

    /// Holds back all answers from now on, except to logins.
    pub fn silence_everybody(&self) {
        self.silence.lock().unwrap().everybody = true;
    }

    /// Holds back all that would come over the connections there are; those that are made later are not disturbed.
    pub fn freeze(&self) {
        let mut silence = self.silence.lock().unwrap();
        silence.made_before = silence.made;
    }

    /// Returns how many connections have had something held back.
    pub fn held(&self) -> usize {
        self.silence.lock().unwrap().held
    }
}

/// Carries one connection until either side ends it.
fn carry(client: TcpStream, socket: PathBuf, silence: &Arc<Mutex<Silence>>) -> io::Result<()> {
    let number = {
        let mut silence = silence.lock().unwrap();
        silence.made += 1;
        silence.made
    };
    let server = UnixStream::connect(socket)?;
    let (replicates, streams) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let asked = [(replicates.clone(), &b"replication\0"[..]), (streams.clone(), &b"START_REPLICATION"[..])];
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || {
        let mut buffer = [0; 16 * 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            for (known, words) in &asked {
                known.fetch_or(holds(&buffer[..count], words), Ordering::Relaxed);
            }
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        // The server must not wait for a client that is gone, though its answers are held back.
        let _ = to.shutdown(Shutdown::Both);
    });
    let ended = answer(
        server,
        &client,
        |logged_in| {
            let silence = silence.lock().unwrap();
            let of_all = silence.everybody || number <= silence.made_before;
            let of_sessions = silence.sessions && !replicates.load(Ordering::Relaxed);
            let of_streams = silence.streams && streams.load(Ordering::Relaxed);
            logged_in && (of_all || of_sessions || of_streams)
        },
        || silence.lock().unwrap().held += 1,
    );
    let _ = client.shutdown(Shutdown::Both);
    ended
}

/// Carries what the server says, and for good nothing more once it is to be silent.
fn answer(
    mut server: UnixStream,
    mut client: &TcpStream,
    is_silent: impl Fn(bool) -> bool,
    held: impl Fn(),
) -> io::Result<()> {
    let (mut login, mut logged_in) = (Vec::new(), false);
    let mut buffer = [0; 16 * 1024];
    loop {
        let count = server.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        if is_silent(logged_in) {
            held();
            // Until the client has given up, and the other half has ended the connection to the server.
            while server.read(&mut buffer)? > 0 {
                thread::sleep(Duration::from_millis(1));
            }
            return Ok(());
        }
        if !logged_in {
            login.extend_from_slice(&buffer[..count]);
            logged_in = is_ready(&login);
        }
        client.write_all(&buffer[..count])?;
    }
}

/// Tells whether messages of a server end with that it is ready for a query.
fn is_ready(mut messages: &[u8]) -> bool {
    while let [kind, a, b, c, d, ..] = *messages {
        let length = u32::from_be_bytes([a, b, c, d]) as usize + 1;
        if messages.len() < length {
            return false;
        }
        if kind == b'Z' {
            return true;
        }
        messages = &messages[length..];
    }
    false
}

fn holds(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}
