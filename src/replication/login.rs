//! The start of a replication connection: TLS, the start-up message, and who we are.
//!
//! The statement crate cannot ask for `replication`, so its part is done here with the same settings: trust, cleartext
//! and MD5 passwords, SCRAM-SHA-256, and SCRAM-SHA-256-PLUS over TLS. A server that proves by SCRAM that it knows the
//! password is the only one that is believed where SCRAM was begun.

use std::io;

use bytes::BytesMut;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, ScramSha256};
use postgres_protocol::message::backend::{AuthenticationSaslBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::fallible_iterator::FallibleIterator;

use super::connection::{Attempt, Spoken};
use super::settings::ChannelBinding;
use super::tls::{self, Encryption};
use super::wire::{Incoming, Stream, Wire, refusal, unexpected};
use crate::replication::Error;

/// Replication commands of a physical standby.
pub(super) struct PhysicalReplication;

impl Spoken for PhysicalReplication {
    type Link = Wire;

    async fn over_socket(attempt: Attempt<'_>, stream: UnixStream) -> Result<Wire, Error> {
        log_in(attempt, Box::new(stream), None).await
    }

    async fn over_tcp(
        attempt: Attempt<'_>,
        mut stream: TcpStream,
        encryption: Encryption,
    ) -> Result<Wire, Error> {
        if encryption == Encryption::Plain {
            return log_in(attempt, Box::new(stream), None).await;
        }
        let offered = attempt.target.tls.direct
            || offers_tls(&mut stream).await.map_err(|error| attempt.unreachable(error))?;
        if !offered && encryption == Encryption::Required {
            let address = attempt.endpoint.address.to_string();
            return Err(Error::Tls { address, detail: "server does not support TLS".into() });
        }
        if !offered {
            return log_in(attempt, Box::new(stream), None).await;
        }
        let name = attempt.endpoint.address.certificate_name();
        let secured = tls::secure(&attempt.target.tls, &name, stream).await.map_err(|error| match error {
            tls::NotSecured::Settings(error) => error,
            tls::NotSecured::Handshake(error) => {
                Error::Tls { address: attempt.endpoint.address.to_string(), detail: error.to_string() }
            }
        })?;
        log_in(attempt, Box::new(secured.stream), secured.end_point).await
    }
}

/// Asks the server whether it speaks TLS; it answers with one letter.
async fn offers_tls(stream: &mut TcpStream) -> io::Result<bool> {
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    stream.write_all(&request).await?;
    match stream.read_u8().await? {
        b'S' => Ok(true),
        b'N' => Ok(false),
        other => Err(io::Error::other(format!("the server answers '{}'", other.escape_ascii()))),
    }
}

/// Starts up; `end_point` ties a password exchange to the TLS connection.
async fn log_in(
    attempt: Attempt<'_>,
    stream: Box<dyn Stream>,
    end_point: Option<Vec<u8>>,
) -> Result<Wire, Error> {
    let target = attempt.target;
    let mut wire = Wire::new(stream);
    let mut start = BytesMut::new();
    let parameters = [
        ("user", target.user.as_str()),
        ("database", target.dbname.as_str()),
        ("replication", "true"),
        ("client_encoding", "UTF8"),
        ("application_name", target.application_name.as_str()),
        ("options", target.options.as_str()),
    ];
    let given = parameters.into_iter().filter(|(_, value)| !value.is_empty());
    frontend::startup_message(given, &mut start).map_err(|error| unexpected(error.to_string()))?;
    wire.send(&start).await.map_err(|error| attempt.unreachable(error))?;
    let mut login = Login { attempt, end_point, scram: None, proven: false };
    loop {
        let message = match wire.next().await {
            Ok(message) => message,
            Err(Error::Lost { detail }) => return Err(attempt.unreachable(detail)),
            Err(error) => return Err(error),
        };
        match message {
            Incoming::Other(Message::ReadyForQuery(_)) => return Ok(wire),
            Incoming::Other(Message::BackendKeyData(_)) => {}
            Incoming::Other(Message::ErrorResponse(answer)) => {
                return Err(attempt.refused_by_server(refused(refusal(answer.fields()))));
            }
            Incoming::Other(message) => {
                if let Some(answer) = login.answer(message)? {
                    wire.send(&answer).await?;
                }
            }
            _ => return Err(unexpected("copy data before the connection was made".into())),
        }
    }
}

/// A server that goes down while we log in is lost to `refusal`; here it merely does not accept connections.
fn refused(error: Error) -> Error {
    match error {
        Error::Lost { detail } => {
            Error::Sql { sqlstate: "57P03".into(), message: detail, detail: None, hint: None }
        }
        other => other,
    }
}

struct Login<'a> {
    attempt: Attempt<'a>,
    end_point: Option<Vec<u8>>,
    scram: Option<ScramSha256>,
    /// The server has shown that it knows the password.
    proven: bool,
}

impl Login<'_> {
    /// Returns what to send to one message of the authentication, if anything.
    fn answer(&mut self, message: Message) -> Result<Option<BytesMut>, Error> {
        let mut out = BytesMut::new();
        let attempt = self.attempt;
        let broken = |error: io::Error| failed(attempt, &error.to_string());
        match message {
            Message::AuthenticationOk if self.scram.is_some() && !self.proven => {
                return Err(self.attempt_failed("the server ended the exchange before its proof"));
            }
            Message::AuthenticationOk => {
                let bound = self.proven && self.end_point.is_some();
                if self.attempt.target.channel_binding == ChannelBinding::Require && !bound {
                    return Err(self.attempt_failed("channel binding is required and was not used"));
                }
                return Ok(None);
            }
            Message::AuthenticationCleartextPassword | Message::AuthenticationMd5Password(_)
                if self.scram.is_some() || self.attempt.target.channel_binding == ChannelBinding::Require =>
            {
                return Err(self.attempt_failed("the server asks for a password in a way that was ruled out"));
            }
            Message::AuthenticationCleartextPassword => {
                frontend::password_message(self.password()?, &mut out).map_err(broken)?;
            }
            Message::AuthenticationMd5Password(body) => {
                let user = self.attempt.target.user.as_bytes();
                let hash = md5_hash(user, self.password()?, body.salt());
                frontend::password_message(hash.as_bytes(), &mut out).map_err(broken)?;
            }
            Message::AuthenticationSasl(body) => self.begin_scram(&body, &mut out)?,
            Message::AuthenticationSaslContinue(body) => {
                let Some(mut scram) = self.scram.take() else {
                    return Err(unexpected("the server goes on with an exchange that nobody began".into()));
                };
                scram.update(body.data()).map_err(broken)?;
                frontend::sasl_response(scram.message(), &mut out).map_err(broken)?;
                self.scram = Some(scram);
            }
            Message::AuthenticationSaslFinal(body) => {
                let Some(mut scram) = self.scram.take() else {
                    return Err(unexpected("the server ends an exchange that nobody began".into()));
                };
                scram.finish(body.data()).map_err(broken)?;
                (self.scram, self.proven) = (Some(scram), true);
                return Ok(None);
            }
            _ => {
                return Err(
                    self.attempt_failed("the server asks for a way of authentication that is not supported")
                );
            }
        }
        Ok(Some(out))
    }

    fn begin_scram(&mut self, body: &AuthenticationSaslBody, out: &mut BytesMut) -> Result<(), Error> {
        let (mut plain, mut plus) = (false, false);
        let mut mechanisms = body.mechanisms();
        while let Some(mechanism) = mechanisms.next().map_err(|error| unexpected(error.to_string()))? {
            plain |= mechanism == sasl::SCRAM_SHA_256;
            plus |= mechanism == sasl::SCRAM_SHA_256_PLUS;
        }
        let wanted = self.attempt.target.channel_binding != ChannelBinding::Disable;
        let end_point = self.end_point.take().filter(|_| wanted);
        let (binding, mechanism) = match end_point {
            Some(end_point) if plus => {
                self.end_point = Some(end_point.clone());
                (sasl::ChannelBinding::tls_server_end_point(end_point), sasl::SCRAM_SHA_256_PLUS)
            }
            Some(_) if plain => (sasl::ChannelBinding::unrequested(), sasl::SCRAM_SHA_256),
            None if plain => (sasl::ChannelBinding::unsupported(), sasl::SCRAM_SHA_256),
            _ => return Err(self.attempt_failed("the server offers no mechanism that is supported")),
        };
        let scram = ScramSha256::new(self.password()?, binding);
        frontend::sasl_initial_response(mechanism, scram.message(), out)
            .map_err(|error| self.attempt_failed(&error.to_string()))?;
        self.scram = Some(scram);
        Ok(())
    }

    fn password(&self) -> Result<&[u8], Error> {
        let password = self.attempt.endpoint.password.as_deref();
        password.map(str::as_bytes).ok_or_else(|| self.attempt_failed("password missing"))
    }

    fn attempt_failed(&self, message: &str) -> Error {
        failed(self.attempt, message)
    }
}

fn failed(attempt: Attempt<'_>, message: &str) -> Error {
    let (address, user) = (attempt.endpoint.address.to_string(), attempt.target.user.clone());
    Error::AuthenticationFailed { address, user, message: message.to_owned() }
}
