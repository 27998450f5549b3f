//! Connects: every endpoint of the target in turn, with every way of encryption the settings allow.
//!
//! As with libpq, a server that does not answer sends us to the next host, a server that refuses the user ends the
//! search. Root is special: where peer authentication refuses it, the connection is made again as the owner of the
//! server's socket, because that is the user who may always speak to the cluster. What is spoken once the stream is
//! open is the caller's choice ([`Spoken`]): statements here, replication commands in `login`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::config::{self as wire, Config};
use tokio_postgres::tls::{MakeTlsConnect, NoTlsStream, TlsConnect, TlsStream};
use tokio_postgres::{Client, Connection, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::settings::{self, Address, ChannelBinding, Endpoint, Target};
use super::socket;
use super::tls::{self, Encryption};
use crate::replication::Error;

/// The run-time parameter by which a session recognizes itself; a pooler does not pass it on.
pub(super) const MARKER: &str = "walden.session";

/// How to reach a server: what libpq would be given, and nothing read from the process's environment.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ConnectOptions {
    /// A connection string of either form.
    pub conninfo: String,
    /// The PG* variables and HOME, as `config` found them.
    pub env: BTreeMap<String, String>,
    /// A password file, where neither `conninfo` nor PGPASSFILE names one.
    pub passfile: Option<PathBuf>,
    /// The user to be towards peer authentication on a Unix socket; takes root.
    pub connect_as: Option<u32>,
}

impl ConnectOptions {
    /// Creates options from a connection string alone.
    pub fn new(conninfo: impl Into<String>) -> Self {
        Self { conninfo: conninfo.into(), ..Self::default() }
    }

    /// Returns the same options with one keyword set, over whatever the connection string says.
    pub fn with(&self, keyword: &str, value: &str) -> Result<Self, Error> {
        let mut keywords = super::conninfo::parse(&self.conninfo)?;
        super::conninfo::insert(&mut keywords, keyword, value.to_owned())?;
        let quote = |value: &str| value.replace('\\', r"\\").replace('\'', r"\'");
        let pairs: Vec<String> = keywords.iter().map(|(k, v)| format!("{k}='{}'", quote(v))).collect();
        Ok(Self { conninfo: pairs.join(" "), ..self.clone() })
    }
}

/// Passwords stay out of logs.
impl fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = match super::conninfo::parse(&self.conninfo) {
            Ok(mut keywords) => {
                keywords.entry("password".into()).and_modify(|secret| "***".clone_into(secret));
                format!("{keywords:?}")
            }
            Err(_) => "(not parsed)".to_owned(),
        };
        f.debug_struct("ConnectOptions")
            .field("conninfo", &shown)
            .field("passfile", &self.passfile)
            .field("connect_as", &self.connect_as)
            .finish_non_exhaustive()
    }
}

/// A connection as it was made.
pub(super) struct Connected<L> {
    pub(super) link: L,
    pub(super) address: String,
    pub(super) user: String,
}

/// What is spoken over a stream once it is open.
pub(super) trait Spoken {
    /// What remains of a connection that was made.
    type Link;

    async fn over_socket(attempt: Attempt<'_>, stream: UnixStream) -> Result<Self::Link, Error>;

    async fn over_tcp(
        attempt: Attempt<'_>,
        stream: TcpStream,
        encryption: Encryption,
    ) -> Result<Self::Link, Error>;
}

/// Statements, by way of the crate that knows them.
pub(super) struct Statements;

impl Spoken for Statements {
    type Link = (Client, Driver);

    async fn over_socket(attempt: Attempt<'_>, stream: UnixStream) -> Result<Self::Link, Error> {
        let (client, connection) = attempt.start(stream, NoTls, Encryption::Plain).await?;
        Ok((client, Driver::Socket(Box::new(connection))))
    }

    async fn over_tcp(
        attempt: Attempt<'_>,
        stream: TcpStream,
        encryption: Encryption,
    ) -> Result<Self::Link, Error> {
        if encryption == Encryption::Plain {
            let (client, connection) = attempt.start(stream, NoTls, encryption).await?;
            return Ok((client, Driver::Tcp(Box::new(connection))));
        }
        let endpoint = attempt.endpoint;
        let connector = tls::connector(&attempt.target.tls, &endpoint.address.certificate_name())?;
        let (client, connection) = attempt.start(stream, connector, encryption).await?;
        Ok((client, Driver::Tls(Box::new(connection))))
    }
}

/// The half of a connection that has to be polled for the other half to work.
pub(super) enum Driver {
    Tcp(Box<Connection<TcpStream, NoTlsStream>>),
    Tls(Box<Connection<TcpStream, RustlsStream>>),
    Socket(Box<Connection<UnixStream, NoTlsStream>>),
}

type RustlsStream = <MakeRustlsConnect as MakeTlsConnect<TcpStream>>::Stream;

impl Driver {
    /// Runs the connection until it ends, and returns why it did.
    pub(super) async fn run(self) -> Option<tokio_postgres::Error> {
        let ended = match self {
            Self::Tcp(connection) => connection.await,
            Self::Tls(connection) => connection.await,
            Self::Socket(connection) => connection.await,
        };
        ended.err()
    }
}

/// Tries the endpoints of `target` from the `first` on, and returns the connection with its endpoint's number.
pub(super) async fn connect<S: Spoken>(
    target: &Target,
    options: &ConnectOptions,
    marker: &str,
    first: usize,
) -> Result<(Connected<S::Link>, usize), Error> {
    let mut failure = Error::Settings { detail: "there is no host to connect to".into() };
    for (number, endpoint) in target.endpoints.iter().enumerate().skip(first) {
        let attempt = Attempt { target, endpoint, marker };
        let result = match &endpoint.address {
            Address::Socket(_) => attempt.over_socket::<S>(options.connect_as).await,
            Address::Tcp { .. } => attempt.over_tcp::<S>().await,
        };
        match result {
            Ok(connected) => return Ok((connected, number)),
            Err(error) => failure = error,
        }
        if !matches!(failure, Error::Unreachable { .. } | Error::NotAccepting { .. }) {
            break;
        }
        tracing::debug!(address = %endpoint.address, error = %failure, "endpoint passed over");
    }
    Err(failure)
}

/// One endpoint that is tried.
#[derive(Clone, Copy)]
pub(super) struct Attempt<'a> {
    pub(super) target: &'a Target,
    pub(super) endpoint: &'a Endpoint,
    marker: &'a str,
}

impl Attempt<'_> {
    async fn over_socket<S: Spoken>(self, connect_as: Option<u32>) -> Result<Connected<S::Link>, Error> {
        let Address::Socket(path) = &self.endpoint.address else {
            return self.over_tcp::<S>().await;
        };
        let first = self.open_socket::<S>(connect_as).await;
        let am_root = nix::unistd::geteuid().is_root();
        let refused = matches!(first, Err(Error::AuthenticationFailed { .. }));
        let other = refused && am_root && connect_as.is_none();
        let Some(owner) = socket::owner(path).filter(|owner| other && *owner != 0) else { return first };
        tracing::debug!(uid = owner, "root was refused, connecting as the socket's owner");
        self.open_socket::<S>(Some(owner)).await.or(first)
    }

    async fn open_socket<S: Spoken>(self, uid: Option<u32>) -> Result<Connected<S::Link>, Error> {
        let Address::Socket(path) = &self.endpoint.address else {
            return Err(self.unreachable("it is no socket"));
        };
        self.within_timeout(async {
            let stream = socket::connect_unix(path, uid).await.map_err(|e| self.unreachable(e))?;
            Ok(self.connected(S::over_socket(self, stream).await?))
        })
        .await
    }

    async fn over_tcp<S: Spoken>(self) -> Result<Connected<S::Link>, Error> {
        let mut failure = None;
        for encryption in self.target.tls.mode.attempts() {
            match self.within_timeout(self.open_tcp::<S>(*encryption)).await {
                Ok(connected) => return Ok(connected),
                // Only what the other way of encryption could cure is tried again, and the first refusal is the
                // one worth telling.
                Err(error @ (Error::Tls { .. } | Error::AuthenticationFailed { .. })) => {
                    failure.get_or_insert(error);
                }
                Err(error) => return Err(failure.unwrap_or(error)),
            }
        }
        Err(failure.expect("every sslmode has an attempt, and each ended in an error"))
    }

    async fn open_tcp<S: Spoken>(self, encryption: Encryption) -> Result<Connected<S::Link>, Error> {
        let opened = socket::connect_tcp(&self.endpoint.address, self.target.keepalive).await;
        let stream = opened.map_err(|e| self.unreachable(e))?;
        Ok(self.connected(S::over_tcp(self, stream, encryption).await?))
    }

    async fn start<S, T>(
        self,
        stream: S,
        tls: T,
        encryption: Encryption,
    ) -> Result<(Client, Connection<S, T::Stream>), Error>
    where
        S: AsyncRead + AsyncWrite + Unpin,
        T: TlsConnect<S>,
        T::Stream: TlsStream,
    {
        let config = self.config(encryption);
        config.connect_raw(stream, tls).await.map_err(|error| self.refused(&error))
    }

    fn config(self, encryption: Encryption) -> Config {
        let target = self.target;
        let mut config = Config::new();
        config.user(&target.user).dbname(&target.dbname).application_name(&target.application_name);
        config.options(format!("{} -c {MARKER}={}", target.options, self.marker).trim_start());
        config.ssl_mode(match encryption {
            Encryption::Plain => wire::SslMode::Disable,
            Encryption::IfOffered => wire::SslMode::Prefer,
            Encryption::Required => wire::SslMode::Require,
        });
        if target.tls.direct && encryption == Encryption::Required {
            config.ssl_negotiation(wire::SslNegotiation::Direct);
        }
        config.channel_binding(match target.channel_binding {
            ChannelBinding::Disable => wire::ChannelBinding::Disable,
            ChannelBinding::Prefer => wire::ChannelBinding::Prefer,
            ChannelBinding::Require => wire::ChannelBinding::Require,
        });
        if let Some(password) = &self.endpoint.password {
            config.password(password);
        }
        config
    }

    async fn within_timeout<L>(
        self,
        opening: impl Future<Output = Result<Connected<L>, Error>>,
    ) -> Result<Connected<L>, Error> {
        let Some(timeout) = self.target.connect_timeout else { return opening.await };
        let result = tokio::time::timeout(timeout, opening).await;
        result.unwrap_or_else(|_| Err(self.unreachable(format!("no answer within {} s", timeout.as_secs()))))
    }

    fn connected<L>(self, link: L) -> Connected<L> {
        let address = self.endpoint.address.to_string();
        Connected { link, address, user: self.target.user.clone() }
    }

    pub(super) fn unreachable(self, detail: impl fmt::Display) -> Error {
        Error::Unreachable { address: self.endpoint.address.to_string(), detail: detail.to_string() }
    }

    /// Sorts what the start-up of a connection failed with.
    fn refused(self, error: &tokio_postgres::Error) -> Error {
        let address = self.endpoint.address.to_string();
        if let Some(answer) = error.as_db_error() {
            let answer = super::session::sql_error(answer);
            return self.refused_by_server(answer);
        }
        // The crate keeps its kinds of error to itself; their words are all it shows.
        let detail = super::session::describe(error);
        if let Some(detail) = detail.strip_prefix("error performing TLS handshake: ") {
            return Error::Tls { address, detail: detail.to_owned() };
        }
        for prefix in ["invalid configuration: ", "authentication error: "] {
            if let Some(message) = detail.strip_prefix(prefix) {
                let user = self.target.user.clone();
                return Error::AuthenticationFailed { address, user, message: message.to_owned() };
            }
        }
        Error::Unreachable { address, detail }
    }

    /// Sorts what a server refused a connection with.
    pub(super) fn refused_by_server(self, answer: Error) -> Error {
        let Error::Sql { sqlstate, message, .. } = &answer else { return answer };
        let (address, message) = (self.endpoint.address.to_string(), message.clone());
        match sqlstate.as_str() {
            "57P01" | "57P02" | "57P03" => Error::NotAccepting { address, message },
            // What pgbouncer answers to `options`, which a server always takes.
            "08P01" if message.contains("startup parameter") => Error::Pooled { address },
            code if code.starts_with("28") => {
                Error::AuthenticationFailed { address, user: self.target.user.clone(), message }
            }
            _ => answer,
        }
    }
}

impl Address {
    pub(super) fn certificate_name(&self) -> String {
        match self {
            Self::Tcp { host, at: Some(at), .. } if host.is_empty() => at.to_string(),
            Self::Tcp { host, .. } => host.clone(),
            Self::Socket(_) => "localhost".into(),
        }
    }
}

/// Resolves options to a target; a thin name for `session`.
pub(super) fn resolve(options: &ConnectOptions) -> Result<Target, Error> {
    settings::resolve(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_password() {
        for conninfo in ["host=a password=hush", "postgres://u:hush@a/", "host=a password='hush"] {
            let mut options = ConnectOptions::new(conninfo);
            options.env.insert("PGPASSWORD".into(), "hush".into());
            assert!(!format!("{options:?}").contains("hush"), "{options:?}");
        }
    }

    #[test]
    fn one_keyword_can_be_changed_without_touching_the_others() {
        let options = ConnectOptions::new(r"postgres://u:p%27%5Cq@a:5/db");
        let changed = options.with("dbname", "it's").unwrap();
        let keywords = super::super::conninfo::parse(&changed.conninfo).unwrap();
        assert_eq!(
            (&*keywords["dbname"], &*keywords["password"], &*keywords["port"]),
            ("it's", r"p'\q", "5")
        );
    }

    #[tokio::test]
    async fn a_port_nobody_listens_on_is_unreachable_and_every_host_is_tried() {
        let options = ConnectOptions::new("host=127.0.0.1,/nonexistent port=1 user=u");
        let target = resolve(&options).unwrap();
        let Err(error) = connect::<Statements>(&target, &options, "m", 0).await else { panic!("connected") };
        assert!(matches!(&error, Error::Unreachable { address, .. } if address.contains("/nonexistent")));
    }
}
