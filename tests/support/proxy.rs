//! A line to an HTTP server that can be disturbed: between the binary and a store.
//!
//! Each connection carries one request and its answer, so that a fault meets a request and not whichever is next on
//! the wire. Requests with an absolute target come from a client that takes this for its proxy.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use nix::sys::socket::{setsockopt, sockopt::Linger};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, ServerConnection, StreamOwned};

/// What happens to a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// It is taken and never answered; the store does not see it.
    Silence,
    /// It is answered in these bytes; the store does not see it.
    Answer(String),
    /// Half of it reaches the store, then both ends see the connection break.
    CutRequest,
    /// The store does it, and the answer is lost.
    LoseAnswer,
    /// Half of the answer comes back, then the connection is reset.
    CutAnswer,
    /// Half of the answer comes back, then the connection is closed in peace.
    EndAnswer,
    /// It reaches the store without its condition.
    Unconditional,
}

impl Fault {
    /// Makes an answer of S3's with an error code.
    pub fn refusal(status: &str, headers: &str, code: &str) -> Self {
        let body = format!("<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>");
        Self::answer(status, headers, &body)
    }

    /// Makes an answer with any body.
    pub fn answer(status: &str, headers: &str, body: &str) -> Self {
        Self::Answer(format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n{headers}\r\n{body}",
            body.len()
        ))
    }
}

/// Which requests meet a fault.
#[derive(Debug)]
struct Rule {
    method: &'static str,
    /// A part of the request's target.
    part: String,
    /// So many of them go by first.
    skip: usize,
    times: usize,
    fault: Fault,
}

#[derive(Debug, Default)]
struct Plan {
    rules: Vec<Rule>,
    /// Every so many requests, the next of these, which then goes to the end.
    disturbance: Option<(usize, VecDeque<Fault>)>,
    /// The heads of all requests, and how many met a fault.
    heads: Vec<String>,
    faults: usize,
}

/// A running line; it ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    plan: Arc<Mutex<Plan>>,
    scheme: &'static str,
}

impl Proxy {
    /// Starts a line to a server, `http://address:port`.
    pub fn to(endpoint: &str) -> Self {
        Self::start(endpoint, None)
    }

    /// Starts a line that ends TLS, with a certificate and its key as PEM files.
    pub fn with_tls(endpoint: &str, certificate: &Path, key: &Path) -> Self {
        let chain = CertificateDer::pem_file_iter(certificate).unwrap().map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(key).unwrap();
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap();
        Self::start(endpoint, Some(Arc::new(config)))
    }

    fn start(endpoint: &str, tls: Option<Arc<ServerConfig>>) -> Self {
        let upstream: SocketAddr = endpoint.strip_prefix("http://").unwrap().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let plan = Arc::<Mutex<Plan>>::default();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let shared = Arc::clone(&plan);
        // Ends with the process: a test has its own.
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let (plan, tls) = (Arc::clone(&shared), tls.clone());
                std::thread::spawn(move || {
                    // A client that goes away ends its connection and nothing else.
                    let _ = match tls {
                        None => socket.try_clone().and_then(|line| carry(line, &socket, upstream, &plan)),
                        Some(tls) => {
                            let session = ServerConnection::new(tls).expect("the configuration is whole");
                            let line = socket.try_clone().map(|line| StreamOwned::new(session, line));
                            line.and_then(|line| carry(line, &socket, upstream, &plan))
                        }
                    };
                });
            }
        });
        Self { address, plan, scheme }
    }

    /// Returns the address of the near end.
    pub fn endpoint(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    /// Lets the next so many requests of a method, whose target has this part, meet a fault.
    pub fn inject(&self, method: &'static str, part: &str, times: usize, fault: Fault) {
        let rule = Rule { method, part: part.to_owned(), skip: 0, times, fault };
        self.plan.lock().unwrap().rules.push(rule);
    }

    /// Lets requests of a method, whose target has this part, through, whatever faults are injected after this.
    pub fn let_through(&self, method: &'static str, part: &str) {
        let rule = Rule { method, part: part.to_owned(), skip: usize::MAX, times: 1, fault: Fault::Silence };
        self.plan.lock().unwrap().rules.push(rule);
    }

    /// Lets one request meet a fault: the one after so many others.
    pub fn inject_at(&self, position: usize, fault: Fault) {
        let rule = Rule { method: "", part: String::new(), skip: position, times: 1, fault };
        self.plan.lock().unwrap().rules.push(rule);
    }

    /// Lets every request after so many others meet a fault.
    pub fn inject_from(&self, position: usize, fault: Fault) {
        let rule = Rule { method: "", part: String::new(), skip: position, times: usize::MAX, fault };
        self.plan.lock().unwrap().rules.push(rule);
    }

    /// Lets every request meet a fault from now on, whatever they met before.
    pub fn inject_only(&self, fault: Fault) {
        let rule = Rule { method: "", part: String::new(), skip: 0, times: usize::MAX, fault };
        self.plan.lock().unwrap().rules = vec![rule];
    }

    /// Lets every n-th request meet one fault after the other.
    pub fn disturb(&self, every: usize, faults: impl IntoIterator<Item = Fault>) {
        self.plan.lock().unwrap().disturbance = Some((every, faults.into_iter().collect()));
    }

    /// Ends every fault; returns how many requests have met one.
    pub fn heal(&self) -> usize {
        let mut plan = self.plan.lock().unwrap();
        plan.rules.clear();
        plan.disturbance = None;
        std::mem::take(&mut plan.faults)
    }

    /// Returns the heads of the requests since the last call, with the method first.
    pub fn take_requests(&self) -> Vec<String> {
        std::mem::take(&mut self.plan.lock().unwrap().heads)
    }
}

impl Plan {
    fn fault(&mut self, head: &str) -> Option<Fault> {
        self.heads.push(head.to_owned());
        let target = head.split(' ').nth(1).unwrap_or_default();
        let meets =
            |rule: &&mut Rule| rule.times > 0 && head.starts_with(rule.method) && target.contains(&rule.part);
        let ruled = self.rules.iter_mut().find(meets).and_then(|rule| {
            if rule.skip > 0 {
                rule.skip -= 1;
                return None;
            }
            rule.times = rule.times.saturating_sub(1);
            Some(rule.fault.clone())
        });
        let count = self.heads.len();
        let fault = ruled.or_else(|| {
            let (every, faults) = self.disturbance.as_mut()?;
            if !count.is_multiple_of(*every) {
                return None;
            }
            faults.rotate_left(1);
            faults.back().cloned()
        });
        self.faults += usize::from(fault.is_some());
        fault
    }
}

/// Carries one request and its answer.
fn carry(
    mut line: impl Read + Write,
    socket: &TcpStream,
    upstream: SocketAddr,
    plan: &Mutex<Plan>,
) -> std::io::Result<()> {
    let Some((head, body)) = receive(&mut line)? else { return Ok(()) };
    let fault = plan.lock().unwrap().fault(&head);
    let unconditional = matches!(fault, Some(Fault::Unconditional));
    let request = [forwarded(&head, unconditional).into_bytes(), body].concat();
    match fault {
        Some(Fault::Silence) => {
            // Until the client gives up.
            while line.read(&mut [0; 1024])? > 0 {}
            return Ok(());
        }
        Some(Fault::Answer(answer)) => {
            line.write_all(answer.as_bytes())?;
        }
        Some(Fault::CutRequest) => {
            let mut store = TcpStream::connect(upstream)?;
            store.write_all(&request[..request.len() / 2])?;
            store.shutdown(Shutdown::Both)?;
            return reset(socket);
        }
        Some(Fault::LoseAnswer) => {
            ask(upstream, &request)?;
            return reset(socket);
        }
        Some(Fault::CutAnswer) => {
            let answer = ask(upstream, &request)?;
            line.write_all(&answer[..half_of_body(&answer)])?;
            return reset(socket);
        }
        Some(Fault::EndAnswer) => {
            let answer = ask(upstream, &request)?;
            line.write_all(&answer[..half_of_body(&answer)])?;
        }
        None | Some(Fault::Unconditional) => {
            line.write_all(&ask(upstream, &request)?)?;
        }
    }
    line.flush()?;
    socket.shutdown(Shutdown::Write)
}

/// Receives a request: its head, and its body as long as the head says.
fn receive(line: &mut impl Read) -> std::io::Result<Option<(String, Vec<u8>)>> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 * 1024];
    let mut more = |bytes: &mut Vec<u8>| -> std::io::Result<bool> {
        let count = line.read(&mut buffer)?;
        bytes.extend_from_slice(&buffer[..count]);
        Ok(count > 0)
    };
    let end = loop {
        if let Some(end) = end_of_head(&bytes) {
            break end;
        }
        if !more(&mut bytes)? {
            return Ok(None);
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let length = header(&head, "content-length").map_or(0, |value| value.parse().unwrap());
    while bytes.len() < end + length {
        if !more(&mut bytes)? {
            return Ok(None);
        }
    }
    Ok(Some((head, bytes.split_off(end))))
}

/// Returns the value of a header.
pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    lines.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

/// Rewrites a head for the store: one request a connection, and a target without the host.
fn forwarded(head: &str, unconditional: bool) -> String {
    let (method, rest) = head.split_once(' ').unwrap();
    let rest = match rest.strip_prefix("http://") {
        Some(absolute) => &absolute[absolute.find('/').unwrap()..],
        None => rest,
    };
    let dropped = |line: &&str| !(unconditional && line.to_ascii_lowercase().starts_with("if-none-match:"));
    let lines: Vec<&str> = rest.trim_end().split("\r\n").filter(dropped).collect();
    format!("{method} {}\r\nconnection: close\r\n\r\n", lines.join("\r\n"))
}

/// Lets the store answer. One that refuses may close before it has read the body: its answer counts all the same.
fn ask(upstream: SocketAddr, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut store = TcpStream::connect(upstream)?;
    let written = store.write_all(request);
    let mut answer = Vec::new();
    match store.read_to_end(&mut answer) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => Err(error),
        _ if answer.is_empty() => written.and(Err(ErrorKind::UnexpectedEof.into())),
        _ => Ok(answer),
    }
}

fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

/// Returns where to cut an answer: in the middle of its body, or of its head where it has no body.
fn half_of_body(answer: &[u8]) -> usize {
    match end_of_head(answer) {
        Some(end) if end < answer.len() => end + (answer.len() - end) / 2,
        _ => answer.len() / 2,
    }
}

/// Closes a connection so that the other end sees it reset.
fn reset(socket: &TcpStream) -> std::io::Result<()> {
    setsockopt(socket, Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).map_err(std::io::Error::from)
}
