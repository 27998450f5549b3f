//! A server on loopback that gives credentials: the security token service, the agent of a container and the metadata
//! service of a machine in one, told apart by what is asked.
//!
//! Each time it gives another key of [`SESSION_KEYS`]. Shared by the unit tests of `storage` and by the integration
//! tests, each of which includes this file.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

/// The names of the keys it gives, one after the other, and then from the first again: more than a test uses up, or one that
/// has expired would be given again.
pub const SESSION_KEYS: [&str; 12] = [
    "session-1",
    "session-2",
    "session-3",
    "session-4",
    "session-5",
    "session-6",
    "session-7",
    "session-8",
    "session-9",
    "session-10",
    "session-11",
    "session-12",
];

/// What the metadata service wants to see once a session has begun.
const METADATA_SESSION: &str = "metadata-session";

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The request line and the headers.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Asked {
    /// Returns the value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        lines.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }
}

/// What it does with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mood {
    /// It gives the next key.
    Giving,
    /// It gives the last key again.
    Repeating,
    /// It answers with this status and body.
    Refusing(&'static str, &'static str),
    /// It takes the request and says nothing.
    Silent,
}

#[derive(Debug)]
struct State {
    mood: Mood,
    secret: &'static str,
    expiration: String,
    given: usize,
    asked: Vec<Asked>,
}

/// A running server; it ends with the process.
#[derive(Debug)]
pub struct Giver {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Giver {
    /// Starts a server that gives keys with this secret, for ten years.
    pub fn start(secret: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = State {
            mood: Mood::Giving,
            secret,
            expiration: "2036-11-20T00:00:00Z".to_owned(),
            given: 0,
            asked: Vec::new(),
        };
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                // A client that goes away ends its connection and nothing else.
                std::thread::spawn(move || drop(serve(socket, &state)));
            }
        });
        Self { address, state }
    }

    /// Returns the server's address, `http://127.0.0.1:port`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Changes what it does from now on.
    pub fn set(&self, mood: Mood) {
        self.state().mood = mood;
    }

    /// Says when what it gives from now on expires.
    pub fn expiring(&self, at: &str) {
        at.clone_into(&mut self.state().expiration);
    }

    /// Returns how many keys it has given.
    pub fn given(&self) -> usize {
        self.state().given
    }

    /// Returns the requests since the last call.
    pub fn take_asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state().asked)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

fn serve(mut socket: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let asked = receive(&mut socket)?;
    let (mood, answer) = {
        let mut state = state.lock().unwrap();
        state.asked.push(asked.clone());
        (state.mood.clone(), state.answer(&asked))
    };
    if mood == Mood::Silent {
        // Until the client gives up.
        while socket.read(&mut [0; 1024])? > 0 {}
        return Ok(());
    }
    let (status, body) = answer;
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    socket.write_all((head + &body).as_bytes())
}

impl State {
    fn answer(&mut self, asked: &Asked) -> (&'static str, String) {
        let (line, session) = (asked.head.lines().next().unwrap(), asked.header("x-aws-ec2-metadata-token"));
        match (self.mood.clone(), line) {
            (Mood::Refusing(status, body), _) => (status, body.to_owned()),
            (Mood::Silent, _) => ("200 OK", String::new()),
            (_, line) if line.starts_with("PUT /latest/api/token ") => {
                ("200 OK", METADATA_SESSION.to_owned())
            }
            (_, line) if line.contains(" /latest/") && session != Some(METADATA_SESSION) => {
                ("401 Unauthorized", String::new())
            }
            (_, line) if line.contains("/security-credentials/ ") => ("200 OK", "the-role\n".to_owned()),
            (_, line) if line.contains("/security-credentials/the-role ") => ("200 OK", self.json()),
            (_, line) if line.starts_with("POST / ") => ("200 OK", self.xml()),
            (_, line) if line.starts_with("GET /v1/credentials ") => ("200 OK", self.json()),
            _ => ("404 Not Found", "nothing here".to_owned()),
        }
    }

    fn next(&mut self) -> [String; 2] {
        if self.mood == Mood::Giving || self.given == 0 {
            self.given += 1;
        }
        let key = SESSION_KEYS[(self.given - 1) % SESSION_KEYS.len()];
        [key.to_owned(), format!("token-{}", self.given)]
    }

    fn json(&mut self) -> String {
        let [key, token] = self.next();
        let (secret, expiration) = (self.secret, &self.expiration);
        format!(
            "{{\"Code\":\"Success\",\"AccessKeyId\":\"{key}\",\"SecretAccessKey\":\"{secret}\",\
             \"Token\":\"{token}\",\"Expiration\":\"{expiration}\"}}"
        )
    }

    fn xml(&mut self) -> String {
        let [key, token] = self.next();
        let (secret, expiration) = (self.secret, &self.expiration);
        format!(
            "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>\
             <AccessKeyId>{key}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>\
             <SessionToken>{token}</SessionToken><Expiration>{expiration}</Expiration>\
             </Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )
    }
}

fn receive(socket: &mut TcpStream) -> std::io::Result<Asked> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let asked = Asked { head: head.to_owned(), body: body.to_owned() };
            let length = asked.header("content-length").map_or(0, |value| value.parse().unwrap());
            if body.len() >= length {
                return Ok(asked);
            }
        }
        let count = socket.read(&mut buffer)?;
        if count == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&buffer[..count]);
    }
}
