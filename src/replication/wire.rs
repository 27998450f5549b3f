//! Messages of the wire protocol over one stream, for what the statement crate does not speak: replication.
//!
//! A message is a letter, a length and a body. The length is the peer's word and is checked against
//! [`MESSAGE_BYTES_MAX`] before anything is made room for. Copying messages are taken apart here, because the protocol
//! crate does not know copying in both directions; all others are its own. `next` can be given up at any moment
//! without a byte being lost.

use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::message::backend::{ErrorFields, Message};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_postgres::fallible_iterator::FallibleIterator;

use crate::replication::Error;

/// Any stream to a server.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for S {}

/// A stream cut into messages.
pub(super) struct Wire {
    stream: Box<dyn Stream>,
    incoming: BytesMut,
    /// What a `send` that was given up left.
    outgoing: BytesMut,
}

/// A message from the server.
pub(super) enum Incoming {
    /// Both sides may send copy data from here on.
    CopyBoth,
    CopyData(Bytes),
    CopyDone,
    Other(Message),
}

/// The server sends WAL in pieces of 128 KiB; a history file is some lines. What is longer is none of them.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Read at a time, at least.
const READ_BYTES: usize = 64 << 10;
/// A peer that takes none of our few bytes for so long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Letter and length.
const HEADER_BYTES: usize = 5;

impl Wire {
    /// Speaks over a stream.
    pub(super) fn new(stream: Box<dyn Stream>) -> Self {
        Self { stream, incoming: BytesMut::with_capacity(READ_BYTES), outgoing: BytesMut::new() }
    }

    /// Returns the next message; what the server merely mentions (notices, parameters) is passed over, and a warning is
    /// told: so the server says what it leaves out.
    pub(super) async fn next(&mut self) -> Result<Incoming, Error> {
        if !self.outgoing.is_empty() {
            self.send(&[]).await?;
        }
        loop {
            match take_message(&mut self.incoming)? {
                Some(Incoming::Other(Message::NoticeResponse(notice))) => {
                    let said = refusal(notice.fields());
                    match is_warning(notice.fields()) {
                        true => tracing::warn!("the server says: {said}"),
                        false => tracing::debug!("the server says: {said}"),
                    }
                }
                Some(Incoming::Other(Message::ParameterStatus(_))) => {}
                Some(message) => return Ok(message),
                None => self.fill().await?,
            }
        }
    }

    async fn fill(&mut self) -> Result<(), Error> {
        self.incoming.reserve(READ_BYTES);
        match self.stream.read_buf(&mut self.incoming).await {
            Ok(0) => Err(Error::Lost { detail: "the server closed the connection".into() }),
            Ok(_) => Ok(()),
            Err(error) => Err(lost(&error)),
        }
    }

    /// Sends bytes that are one or more whole messages.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.outgoing.extend_from_slice(bytes);
        let sending = async {
            while !self.outgoing.is_empty() {
                self.stream.write_buf(&mut self.outgoing).await?;
            }
            self.stream.flush().await
        };
        match tokio::time::timeout(WRITE_TIMEOUT, sending).await {
            Ok(sent) => sent.map_err(|error| lost(&error)),
            Err(_) => Err(Error::Lost { detail: "the server takes no more bytes".into() }),
        }
    }
}

/// Takes a whole message off the front of `bytes`, where there is one.
pub(super) fn take_message(bytes: &mut BytesMut) -> Result<Option<Incoming>, Error> {
    let Some(header) = bytes.get(..HEADER_BYTES) else { return Ok(None) };
    let letter = header[0];
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if !(HEADER_BYTES - 1..=MESSAGE_BYTES_MAX).contains(&length) {
        return Err(unexpected(format!("a message '{}' of {length} bytes", letter.escape_ascii())));
    }
    if bytes.len() <= length {
        return Ok(None);
    }
    let body = |bytes: &mut BytesMut| {
        let mut message = bytes.split_to(length + 1);
        message.advance(HEADER_BYTES);
        message.freeze()
    };
    Ok(Some(match letter {
        b'W' => {
            body(bytes);
            Incoming::CopyBoth
        }
        b'd' => Incoming::CopyData(body(bytes)),
        b'c' => {
            body(bytes);
            Incoming::CopyDone
        }
        _ => match Message::parse(bytes) {
            Ok(Some(message)) => Incoming::Other(message),
            Ok(None) => return Err(unexpected("a message that does not end".into())),
            Err(error) => return Err(unexpected(format!("message '{}': {error}", letter.escape_ascii()))),
        },
    }))
}

/// Turns an ErrorResponse into the error it is: a fatal one ends the connection.
pub(super) fn refusal(mut fields: ErrorFields<'_>) -> Error {
    let (mut sqlstate, mut message, mut severity) = (String::new(), String::new(), String::new());
    let (mut detail, mut hint) = (None, None);
    while let Ok(Some(field)) = fields.next() {
        let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'C' => sqlstate = value,
            b'M' => message = value,
            b'V' => severity = value,
            b'D' => detail = Some(value),
            b'H' => hint = Some(value),
            _ => {}
        }
    }
    let gone = ["FATAL", "PANIC"].contains(&severity.as_str()) && sqlstate.starts_with("57");
    if gone { Error::Lost { detail: message } } else { Error::Sql { sqlstate, message, detail, hint } }
}

/// Tells whether what is not an error is more than a note. The field is the one that no language changes.
fn is_warning(mut fields: ErrorFields<'_>) -> bool {
    while let Ok(Some(field)) = fields.next() {
        if field.type_() == b'V' {
            return field.value_bytes() == b"WARNING";
        }
    }
    false
}

pub(super) fn unexpected(detail: String) -> Error {
    Error::Unexpected { detail }
}

fn lost(error: &io::Error) -> Error {
    Error::Lost { detail: error.to_string() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(letter: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![letter];
        bytes.extend((body.len() as u32 + 4).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_message_longer_than_any_is_refused_before_it_comes() {
        for length in [0u32, 3, (1 << 20) + 1, u32::MAX] {
            let mut bytes = BytesMut::from(&b"d"[..]);
            bytes.extend(length.to_be_bytes());
            assert!(matches!(take_message(&mut bytes), Err(Error::Unexpected { .. })), "{length}");
        }
    }

    #[test]
    fn an_error_says_what_the_server_said() {
        let body = b"SERROR\0VERROR\0C58P01\0Mrequested WAL segment has already been removed\0\0";
        let mut bytes = BytesMut::from(&message(b'E', body)[..]);
        let Some(Incoming::Other(Message::ErrorResponse(answer))) = take_message(&mut bytes).unwrap() else {
            panic!("no error");
        };
        let error = refusal(answer.fields());
        assert_eq!(error.sqlstate(), Some("58P01"));
        assert_eq!(error.to_string(), "requested WAL segment has already been removed");
        let body = b"SFATAL\0VFATAL\0C57P01\0Mterminating\0\0";
        let mut bytes = BytesMut::from(&message(b'E', body)[..]);
        let Some(Incoming::Other(Message::ErrorResponse(answer))) = take_message(&mut bytes).unwrap() else {
            panic!("no error");
        };
        assert!(matches!(refusal(answer.fields()), Error::Lost { .. }));
    }

    #[test]
    fn a_warning_is_told_from_a_notice_in_any_language() {
        for (severity, expected) in [("WARNING", true), ("NOTICE", false), ("LOG", false)] {
            let body = format!("SWARNUNG\0V{severity}\0C01000\0Mskipping special file \"./out\"\0\0");
            let mut bytes = BytesMut::from(&message(b'N', body.as_bytes())[..]);
            let Some(Incoming::Other(Message::NoticeResponse(notice))) = take_message(&mut bytes).unwrap()
            else {
                panic!("no notice");
            };
            assert_eq!(is_warning(notice.fields()), expected, "{severity}");
        }
    }

    proptest! {
        #[test]
        fn copy_data_comes_out_whole_however_the_stream_was_cut(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..6),
            cuts in proptest::collection::vec(1usize..40, 1..200),
        ) {
            let mut stream: Vec<u8> = bodies.iter().flat_map(|body| message(b'd', body)).collect();
            stream.extend(message(b'c', b""));
            let (mut incoming, mut found, mut done) = (BytesMut::new(), Vec::new(), false);
            let (mut rest, mut cuts) = (&stream[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                incoming.extend_from_slice(now);
                rest = later;
                while let Some(message) = take_message(&mut incoming).unwrap() {
                    match message {
                        Incoming::CopyData(body) => found.push(body.to_vec()),
                        Incoming::CopyDone => done = true,
                        _ => prop_assert!(false, "another message"),
                    }
                }
            }
            prop_assert!(done && incoming.is_empty());
            prop_assert_eq!(found, bodies);
        }

        #[test]
        fn any_bytes_are_messages_or_refused(bytes: Vec<u8>) {
            let mut incoming = BytesMut::from(&bytes[..]);
            while let Ok(Some(message)) = take_message(&mut incoming) {
                if let Incoming::Other(Message::ErrorResponse(answer)) = message {
                    let _ = refusal(answer.fields()).to_string();
                }
            }
        }
    }
}
