//! Tests of the store in a bucket: against a server in this process, and against peers that misbehave.
//!
//! `Peer` answers each connection with bytes written out here, so that what goes over the wire can be seen.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::super::conformance;
use super::super::error::ErrorKind;
use super::super::probe::{Capabilities, probe};
use super::super::record::Recording;
use super::super::retry::{RetryOptions, Retrying};
use super::super::secret::Secret;
use super::super::url::{Location, Options, open};
use super::server::{ACCESS_KEY_ID, BUCKET, S3Server, SECRET_ACCESS_KEY};
use super::*;
use crate::clock::SystemClock;

fn options(endpoint: String) -> S3Options {
    S3Options {
        endpoint: Some(endpoint),
        access_key_id: Some(Secret::from(ACCESS_KEY_ID.to_owned())),
        secret_access_key: Some(Secret::from(SECRET_ACCESS_KEY.to_owned())),
        ..S3Options::default()
    }
}

fn key(text: &str) -> ObjectKey {
    ObjectKey::parse(text).unwrap()
}

fn body() -> Bytes {
    Bytes::from_static(b"0123456789")
}

#[tokio::test]
async fn keeps_the_contract() {
    let server = S3Server::start().await;
    for prefix in [None, Some(key("deep/prefix"))] {
        let store = S3Store::open(BUCKET, prefix.as_ref(), &options(server.endpoint())).unwrap();
        conformance::check(Arc::new(store), "site/conformance").await;
    }
}

#[tokio::test]
async fn what_is_opened_by_url_keeps_the_contract() {
    let server = S3Server::start().await;
    let options = Options { s3: options(server.endpoint()), ..Options::default() };
    let store = open(&Location::parse("s3://bucket/backups").unwrap(), &options).unwrap();
    let found = probe(&*store, &key("site/probe/1")).await.unwrap();
    assert_eq!(found, Capabilities { create_only: true, read_after_write: true });
    conformance::check(Arc::clone(&store), "site/conformance").await;
    store.create(&key("site/a"), body()).await.unwrap();
    assert_eq!(std::fs::read(server.bucket_folder().join("backups/site/a")).unwrap(), body());
}

#[tokio::test]
async fn a_prefix_hides_what_is_beside_it() {
    let server = S3Server::start().await;
    let store = |prefix| S3Store::open(BUCKET, prefix, &options(server.endpoint())).unwrap();
    let (whole, below) = (store(None), store(Some(&key("one"))));
    whole.create(&key("one/a"), body()).await.unwrap();
    whole.create(&key("one-more/b"), body()).await.unwrap();
    let found = below.list("", None, 10).await.unwrap();
    assert_eq!(found.iter().map(|meta| meta.key.as_str()).collect::<Vec<_>>(), ["a"]);
    assert_eq!(below.list_folder("").await.unwrap().objects.len(), 1);
    assert_eq!(whole.list_folder("").await.unwrap().folders, ["one", "one-more"]);
}

/// More keys than a page holds.
#[tokio::test]
async fn listings_go_on_past_one_page() {
    let server = S3Server::start().await;
    let folder = server.bucket_folder().join("site/many");
    std::fs::create_dir_all(&folder).unwrap();
    for number in 0..2500 {
        std::fs::write(folder.join(format!("{number:04}")), "x").unwrap();
    }
    let store = S3Store::open(BUCKET, None, &options(server.endpoint())).unwrap();
    let names =
        |found: &[ObjectMeta]| found.iter().map(|meta| meta.key.name().to_owned()).collect::<Vec<_>>();
    let wanted: Vec<_> = (0..2500).map(|number| format!("{number:04}")).collect();
    assert_eq!(names(&store.list("site", None, 10_000).await.unwrap()), wanted);
    assert_eq!(names(&store.list("", None, 1500).await.unwrap()), wanted[..1500]);
    let after = key("site/many/0999");
    assert_eq!(names(&store.list("site", Some(&after), 1001).await.unwrap()), wanted[1000..2001]);
    assert_eq!(names(&store.list_folder("site/many").await.unwrap().objects), wanted);
}

#[tokio::test]
async fn neither_a_missing_bucket_nor_wrong_credentials_prove_an_absence() {
    let server = S3Server::start().await;
    let wrong_key =
        S3Options { secret_access_key: Some(Secret::from("wrong".to_owned())), ..options(server.endpoint()) };
    for (bucket, options, kind) in [
        ("elsewhere", options(server.endpoint()), ErrorKind::Invalid),
        (BUCKET, wrong_key, ErrorKind::Denied),
    ] {
        let store = S3Store::open(bucket, None, &options).unwrap();
        let errors = [
            store.get(&key("a"), 1).await.unwrap_err(),
            store.get_range(&key("a"), 0..1).await.unwrap_err(),
            store.head(&key("a")).await.unwrap_err(),
            store.list("", None, 1).await.unwrap_err(),
            store.list_folder("").await.unwrap_err(),
            store.create(&key("a"), body()).await.unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind(), kind, "{bucket}: {error:?}");
            assert!(!format!("{error:?}").contains(SECRET_ACCESS_KEY));
        }
    }
}

#[tokio::test]
async fn nobody_there_is_unreachable_and_nothing_was_created() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let store = S3Store::open(BUCKET, None, &options(endpoint)).unwrap();
    assert_eq!(store.get(&key("a"), 1).await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert_eq!(store.create(&key("a"), body()).await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert_eq!(store.list("", None, 1).await.unwrap_err().kind(), ErrorKind::Unreachable);
}

/// A server that answers the n-th connection with the n-th script, and the last one for ever.
struct Peer {
    endpoint: String,
    accepting: JoinHandle<()>,
}

#[derive(Clone)]
enum Script {
    /// Accepts, reads, and says nothing.
    Silence,
    /// Says this and closes.
    Say(String),
    /// Says this, then nothing more, without closing.
    SayAndHang(String),
}

impl Peer {
    async fn start(scripts: Vec<Script>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let accepting = tokio::spawn(async move {
            let mut held = Vec::new();
            for number in 0.. {
                let (socket, _) = listener.accept().await.unwrap();
                held.extend(play(socket, &scripts[usize::min(number, scripts.len() - 1)]).await);
            }
        });
        Self { endpoint, accepting }
    }

    async fn saying(script: Script) -> (Self, S3Store) {
        let peer = Self::start(vec![script]).await;
        let store = peer.store();
        (peer, store)
    }

    fn store(&self) -> S3Store {
        let options =
            S3Options { read_timeout: Duration::from_millis(100), ..options(self.endpoint.clone()) };
        S3Store::open(BUCKET, None, &options).unwrap()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Plays one script and returns the socket if it is to stay open.
async fn play(mut socket: TcpStream, script: &Script) -> Option<TcpStream> {
    let mut request = Vec::new();
    while !is_whole(&request) {
        if socket.read_buf(&mut request).await.unwrap_or(0) == 0 {
            return None;
        }
    }
    match script {
        Script::Silence => return Some(socket),
        Script::Say(answer) | Script::SayAndHang(answer) => {
            let _ = socket.write_all(answer.as_bytes()).await;
        }
    }
    matches!(script, Script::SayAndHang(_)).then_some(socket)
}

/// Says whether a request's head and body have come.
fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    body.len() >= length.map_or(0, |length| length.parse().unwrap())
}

fn answer(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len())
}

fn refusal(status: &str, code: &str) -> String {
    answer(status, "", &format!("<Error><Code>{code}</Code><Message>as told</Message></Error>"))
}

/// Failure 39.
#[tokio::test]
async fn a_peer_that_accepts_and_never_answers_ends_by_the_timeout() {
    let (_peer, store) = Peer::saying(Script::Silence).await;
    assert_eq!(store.get(&key("a"), 1).await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert_eq!(store.head(&key("a")).await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert_eq!(store.list("", None, 1).await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert_eq!(store.delete(&key("a")).await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert_eq!(store.create(&key("a"), body()).await.unwrap_err().kind(), ErrorKind::OutcomeUnknown);
}

/// The largest listing may take a quarter of an hour on a slow line; one that nobody answers may not.
#[tokio::test]
async fn a_silent_peer_is_asked_no_longer_for_what_may_be_large() {
    let (_peer, store) = Peer::saying(Script::Silence).await;
    let asked = Recording::new(store);
    // Each attempt waits for 100 ms.
    let options = RetryOptions {
        deadline: Duration::from_millis(350),
        attempts_max: u32::MAX,
        pause_first: Duration::from_micros(1),
        pause_max: Duration::from_millis(1),
    };
    let store = Retrying::new(asked.clone(), options, Arc::new(SystemClock), 1);
    assert_eq!(store.list_folder("").await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert_eq!(store.get(&key("a"), 64 << 20).await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert_eq!(store.list("", None, 100_000).await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert!(asked.calls().len() <= 3 * 4, "{} attempts", asked.calls().len());
}

#[tokio::test]
async fn a_peer_that_stops_or_closes_in_mid_body_is_unreachable() {
    let half =
        "HTTP/1.1 200 OK\r\ncontent-length: 10\r\nlast-modified: Fri, 20 Nov 2026 10:15:00 GMT\r\n\r\n01234";
    for script in [Script::SayAndHang(half.to_owned()), Script::Say(half.to_owned())] {
        let (_peer, store) = Peer::saying(script).await;
        let error = store.get(&key("a"), 10).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unreachable, "{error:?}");
        let error = store.list("", None, 1).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unreachable, "{error:?}");
    }
}

#[tokio::test]
async fn a_body_cut_off_once_is_read_whole_by_the_next_attempt() {
    let head =
        "HTTP/1.1 200 OK\r\ncontent-length: 10\r\nlast-modified: Fri, 20 Nov 2026 10:15:00 GMT\r\n\r\n";
    let scripts = [format!("{head}01234"), refusal("503 Slow Down", "SlowDown"), format!("{head}0123456789")];
    let peer = Peer::start(scripts.into_iter().map(Script::Say).collect()).await;
    let options = RetryOptions { pause_first: Duration::from_micros(1), ..RetryOptions::default() };
    let store = Retrying::new(peer.store(), options, Arc::new(SystemClock), 1);
    assert_eq!(store.get(&key("a"), 10).await.unwrap(), body());
}

#[tokio::test]
async fn a_range_that_is_not_the_one_asked_for_is_never_returned() {
    let head = "last-modified: Fri, 20 Nov 2026 10:15:00 GMT\r\n";
    // The whole object instead of the range; another range; a shorter one.
    let whole = answer("200 OK", head, "0123456789");
    let other = answer("206 Partial Content", &format!("{head}content-range: bytes 0-3/10\r\n"), "0123");
    let (_peer, store) = Peer::saying(Script::Say(whole)).await;
    assert_eq!(store.get_range(&key("a"), 2..6).await.unwrap_err().kind(), ErrorKind::Other);
    let (_peer, store) = Peer::saying(Script::Say(other)).await;
    assert_eq!(store.get_range(&key("a"), 2..6).await.unwrap_err().kind(), ErrorKind::Other);
    let shorter = answer("206 Partial Content", &format!("{head}content-range: bytes 2-4/5\r\n"), "234");
    let (_peer, store) = Peer::saying(Script::Say(shorter)).await;
    let error = store.get_range(&key("a"), 2..6).await.unwrap_err();
    assert!(matches!(error, Error::Truncated { expected: 4, received: 3, .. }), "{error:?}");
}

#[tokio::test]
async fn a_size_that_is_announced_takes_no_memory() {
    let huge = "HTTP/1.1 200 OK\r\ncontent-length: 9000000000000000000\r\n\
                last-modified: Fri, 20 Nov 2026 10:15:00 GMT\r\n\r\n01234";
    let (_peer, store) = Peer::saying(Script::Say(huge.to_owned())).await;
    assert_eq!(store.get(&key("a"), 1 << 40).await.unwrap_err().kind(), ErrorKind::TooLarge);
    assert_eq!(store.get(&key("a"), u64::MAX).await.unwrap_err().kind(), ErrorKind::Unreachable);
}

#[tokio::test]
async fn a_404_that_is_not_the_stores_proves_nothing() {
    let page = answer("404 Not Found", "content-type: text/html\r\n", "<html>no such page</html>");
    let (_peer, store) = Peer::saying(Script::Say(page)).await;
    assert_eq!(store.get(&key("a"), 1).await.unwrap_err().kind(), ErrorKind::Other);
    assert_eq!(store.head(&key("a")).await.unwrap_err().kind(), ErrorKind::Other);
    assert_eq!(store.delete(&key("a")).await.unwrap_err().kind(), ErrorKind::Other);
    let (_peer, store) = Peer::saying(Script::Say(refusal("404 Not Found", "NoSuchKey"))).await;
    assert!(store.get(&key("a"), 1).await.unwrap_err().is_absent());
    store.delete(&key("a")).await.unwrap();
}

#[tokio::test]
async fn refusals_of_a_create_are_told_apart() {
    for (status, code, kind) in [
        ("412 Precondition Failed", "PreconditionFailed", ErrorKind::AlreadyExists),
        ("409 Conflict", "ConditionalRequestConflict", ErrorKind::OutcomeUnknown),
        ("503 Service Unavailable", "SlowDown", ErrorKind::OutcomeUnknown),
        ("403 Forbidden", "QuotaExceeded", ErrorKind::Full),
        ("403 Forbidden", "AccessDenied", ErrorKind::Denied),
        ("301 Moved Permanently", "PermanentRedirect", ErrorKind::Invalid),
        ("501 Not Implemented", "NotImplemented", ErrorKind::Other),
    ] {
        let (_peer, store) = Peer::saying(Script::Say(refusal(status, code))).await;
        let error = store.create(&key("a"), body()).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error:?}");
    }
    // Stored, but answered in a way that cannot be understood.
    let (_peer, store) = Peer::saying(Script::Say(answer("200 OK", "", ""))).await;
    assert_eq!(store.create(&key("a"), body()).await.unwrap_err().kind(), ErrorKind::OutcomeUnknown);
}

#[tokio::test]
async fn a_listing_out_of_order_is_refused() {
    let entry = |key: &str| {
        format!(
            "<Contents><Key>{key}</Key><Size>1</Size><LastModified>2026-11-20T10:15:00Z</LastModified></Contents>"
        )
    };
    let page = |keys: [&str; 2]| {
        format!("<ListBucketResult>{}{}</ListBucketResult>", entry(keys[0]), entry(keys[1]))
    };
    let (_peer, store) = Peer::saying(Script::Say(answer("200 OK", "", &page(["b", "a"])))).await;
    assert_eq!(store.list("", None, 9).await.unwrap_err().kind(), ErrorKind::Other);
    // A store that ignores where to start would make a caller go round in circles.
    let (_peer, store) = Peer::saying(Script::Say(answer("200 OK", "", &page(["a", "b"])))).await;
    assert_eq!(store.list("", None, 9).await.unwrap().len(), 2);
    assert_eq!(store.list("", Some(&key("a")), 9).await.unwrap_err().kind(), ErrorKind::Other);
}

/// A 404 says what is missing in its body only: cut off, it is neither an absence nor final.
#[tokio::test]
async fn a_refusal_cut_off_before_its_code_is_asked_for_again() {
    let cut = "HTTP/1.1 404 Not Found\r\ncontent-length: 300\r\n\r\n<Error><Co".to_owned();
    let scripts = [cut, refusal("404 Not Found", "NoSuchKey")].map(Script::Say);
    let peer = Peer::start(vec![scripts[0].clone()]).await;
    assert_eq!(peer.store().get(&key("a"), 1).await.unwrap_err().kind(), ErrorKind::Unreachable);
    assert_eq!(peer.store().head(&key("a")).await.unwrap_err().kind(), ErrorKind::Unreachable);
    let peer = Peer::start(scripts.into()).await;
    let store = Retrying::new(peer.store(), RetryOptions::default(), Arc::new(SystemClock), 1);
    assert!(store.get(&key("a"), 1).await.unwrap_err().is_absent());
}

/// A store that wants to be left alone for longer than anybody waits is not asked again.
#[tokio::test]
async fn a_store_is_left_alone_for_as_long_as_it_asks() {
    let busy = answer("503 Slow Down", "retry-after: 3600\r\n", "<Error><Code>SlowDown</Code></Error>");
    let peer = Peer::start(vec![Script::Say(busy), Script::Say(refusal("404 Not Found", "NoSuchKey"))]).await;
    let options = RetryOptions::within(Duration::from_secs(60));
    let store = Retrying::new(peer.store(), options, Arc::new(SystemClock), 1);
    let error = store.get(&key("a"), 1).await.unwrap_err();
    assert!(error.to_string().ends_with("given up after the first attempt"), "{error}");
}

/// A TLS server with a certificate of its own authority, run by the `openssl` command.
struct TlsPeer {
    folder: tempfile::TempDir,
    port: u16,
    process: std::process::Child,
}

impl TlsPeer {
    fn start() -> Option<Self> {
        use std::io::{BufRead, BufReader};
        use std::process::{Command, Stdio};
        let folder = tempfile::TempDir::new().unwrap();
        let openssl = |arguments: &str| {
            let mut command = Command::new("openssl");
            command.args(arguments.split(' ')).current_dir(folder.path()).stderr(Stdio::null());
            command
        };
        let made =
            openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=authority")
                .stdout(Stdio::null())
                .status();
        made.ok()?;
        std::fs::write(folder.path().join("names"), "subjectAltName=IP:127.0.0.1").unwrap();
        for step in [
            "req -newkey rsa:2048 -nodes -keyout key.pem -out request.pem -subj /CN=store",
            "x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -out cert.pem -extfile names",
        ] {
            assert!(openssl(step).stdout(Stdio::null()).status().unwrap().success(), "openssl {step}");
        }
        let mut process = openssl("s_server -accept 127.0.0.1:0 -cert cert.pem -key key.pem -www")
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let said = BufReader::new(process.stdout.take().unwrap());
        let port =
            said.lines().find_map(|line| line.unwrap().strip_prefix("ACCEPT 127.0.0.1:")?.parse().ok());
        Some(Self { folder, port: port.expect("s_server says where it listens"), process })
    }
}

impl Drop for TlsPeer {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[tokio::test]
async fn a_certificate_is_trusted_by_the_file_that_names_its_authority_and_not_without() {
    let Some(peer) = TlsPeer::start() else {
        eprintln!("SKIPPED: the test of certificates needs the openssl command");
        assert!(std::env::var_os("CI").is_none(), "needs the openssl command");
        return;
    };
    let options = options(format!("https://127.0.0.1:{}", peer.port));
    let stranger = S3Store::open(BUCKET, None, &options).unwrap();
    let error = stranger.get(&key("a"), 1).await.unwrap_err();
    assert!(error.to_string().ends_with("certificate is not trusted"), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::Invalid, "trying again would not help");

    let trusting = S3Options { ca_file: Some(peer.folder.path().join("ca.pem")), ..options };
    let store = S3Store::open(BUCKET, None, &trusting).unwrap();
    // The page that s_server shows is no answer of S3's, but it came through TLS.
    let error = store.get(&key("a"), 1).await.unwrap_err();
    assert_ne!(error.kind(), ErrorKind::Invalid, "{error:?}");
    assert_ne!(error.kind(), ErrorKind::Unreachable, "{error:?}");
}

/// Starts a line to a store that refuses requests signed with some keys, as expired; returns its address.
pub(super) async fn refusing_keys(endpoint: &str, expired: &'static [&'static str]) -> String {
    let upstream = endpoint.strip_prefix("http://").unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            let upstream = upstream.clone();
            tokio::spawn(async move {
                let mut request = Vec::new();
                while !is_whole(&request) {
                    if socket.read_buf(&mut request).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let text = String::from_utf8_lossy(&request).into_owned();
                if expired.iter().any(|key| text.contains(&format!("Credential={key}/"))) {
                    let refused = refusal("400 Bad Request", "ExpiredToken");
                    let _ = socket.write_all(refused.as_bytes()).await;
                    return;
                }
                let mut store = TcpStream::connect(upstream).await.unwrap();
                let closing = text.replacen("\r\n", "\r\nconnection: close\r\n", 1);
                store.write_all(closing.as_bytes()).await.unwrap();
                let mut answer = Vec::new();
                let _ = store.read_to_end(&mut answer).await;
                let _ = socket.write_all(&answer).await;
            });
        }
    });
    format!("http://{address}")
}
