//! The object store of the benches: S3 over TLS from memory, behind a line of known length and width.
//!
//!   bench-store CERTIFICATE KEY DELAY_MS MBIT
//!
//! Prints two ports of 127.0.0.1 and serves the same objects at both until it is killed: `near` at once, `far` over a
//! line of DELAY_MS each way and MBIT a second in each direction of a connection. Nothing touches a disk and no
//! signature is checked, so that as little of the machine as possible is taken from what is measured. `GET /-/counts`
//! says what was asked and moved since the last time it was asked, `DELETE /-/objects/PREFIX` removes objects.

mod http;
mod line;
mod objects;
mod s3;

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use line::Line;
use objects::Objects;

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [certificate, key, delay, mbit] = &arguments[..] else {
        eprintln!("usage: bench-store CERTIFICATE KEY DELAY_MS MBIT");
        std::process::exit(2);
    };
    let line = Line {
        delay: Duration::from_millis(delay.parse().expect("DELAY_MS is a number")),
        bytes_per_second: mbit.parse::<u64>().expect("MBIT is a number") * 1_000_000 / 8,
    };
    let acceptor = acceptor(certificate, key);
    let objects = Arc::new(Objects::default());
    let near = TcpListener::bind("127.0.0.1:0").await.expect("loopback has a free port");
    let far = TcpListener::bind("127.0.0.1:0").await.expect("loopback has a free port");
    let port = |listener: &TcpListener| listener.local_addr().expect("a bound socket has an address").port();
    println!("{} {}", port(&near), port(&far));
    tokio::join!(
        serve(near, acceptor.clone(), objects.clone(), None),
        serve(far, acceptor, objects, Some(line))
    );
}

fn acceptor(certificate: &str, key: &str) -> TlsAcceptor {
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .expect("CERTIFICATE is PEM");
    let key = PrivateKeyDer::from_pem_file(key).expect("KEY is PEM");
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key);
    TlsAcceptor::from(Arc::new(config.expect("certificate and key belong together")))
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor, objects: Arc<Objects>, line: Option<Line>) {
    while let Ok((socket, _)) = listener.accept().await {
        // Nagle's algorithm would hold small answers back for the next acknowledgement.
        let _ = socket.set_nodelay(true);
        let (acceptor, objects) = (acceptor.clone(), objects.clone());
        match line {
            None => tokio::spawn(converse(socket, acceptor, objects)),
            Some(line) => tokio::spawn(converse(line.stretch(socket), acceptor, objects)),
        };
    }
}

/// Serves one connection; a client that goes away in mid-request ends it.
async fn converse<S>(socket: S, acceptor: TlsAcceptor, objects: Arc<Objects>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if let Ok(stream) = acceptor.accept(socket).await {
        let _ = s3::converse(stream, &objects).await;
    }
}
