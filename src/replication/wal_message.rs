//! What is inside copy data while WAL is streamed: WAL and keepalives from the server, our position to it.
//!
//! The layouts are those of the chapter "Streaming Replication Protocol". The server's length of WAL is that of its
//! message, which `wire` bounds; an LSN near the end of the log that bytes would carry over is refused.

use bytes::{Buf, Bytes, BytesMut};

use super::wire::unexpected;
use crate::pg::Lsn;
use crate::replication::Error;

/// One message from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalMessage {
    /// WAL from `start` on; `server_end` is where the server's own WAL ends.
    Wal { start: Lsn, server_end: Lsn, bytes: Bytes },
    /// Nothing new; with `reply` the server wants our position at once.
    Keepalive { server_end: Lsn, reply: bool },
}

/// How far we are, in positions of the timeline that is streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StandbyStatus {
    /// Received.
    pub written: Lsn,
    /// Durable: the server may forget its WAL up to here and end the wait of a commit. Zero: nothing is said.
    pub flushed: Lsn,
    /// Whether the server should answer at once.
    pub reply: bool,
}

/// Letter, start, end and the server's time.
const WAL_HEADER_BYTES: usize = 24;
/// End, the server's time and whether a reply is wanted.
const KEEPALIVE_BYTES: usize = 17;

impl WalMessage {
    /// Reads the content of one CopyData message.
    pub(super) fn parse(mut body: Bytes) -> Result<Self, Error> {
        if body.is_empty() {
            return Err(unexpected("an empty message while streaming".into()));
        }
        let letter = body.get_u8();
        match letter {
            b'w' if body.len() >= WAL_HEADER_BYTES => {
                let (start, server_end) = (Lsn(body.get_u64()), Lsn(body.get_u64()));
                body.advance(8);
                if start.checked_add(body.len() as u64).is_none() {
                    return Err(unexpected(format!("WAL at {start} that ends behind the last LSN")));
                }
                Ok(Self::Wal { start, server_end, bytes: body })
            }
            b'k' if body.len() == KEEPALIVE_BYTES => {
                let server_end = Lsn(body.get_u64());
                body.advance(8);
                Ok(Self::Keepalive { server_end, reply: body.get_u8() != 0 })
            }
            _ => {
                let (letter, length) = (letter.escape_ascii(), body.len());
                Err(unexpected(format!("a message '{letter}' with {length} bytes while streaming")))
            }
        }
    }
}

impl StandbyStatus {
    /// Writes a whole CopyData message. Nothing is ever said to be applied: nobody can read here what a commit wrote.
    /// `micros` are those since 2000, the server's own epoch.
    pub(super) fn write(self, micros: i64, out: &mut BytesMut) {
        const LENGTH: u32 = 4 + 1 + 4 * 8 + 1;
        out.extend_from_slice(b"d");
        out.extend_from_slice(&LENGTH.to_be_bytes());
        out.extend_from_slice(b"r");
        for position in [self.written, self.flushed, Lsn::ZERO] {
            out.extend_from_slice(&position.0.to_be_bytes());
        }
        out.extend_from_slice(&micros.to_be_bytes());
        out.extend_from_slice(&[u8::from(self.reply)]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_lie_as_the_document_says() {
        let mut wal = vec![b'w'];
        wal.extend(0x16_0000_0028u64.to_be_bytes());
        wal.extend(0x16_0000_1000u64.to_be_bytes());
        wal.extend(7i64.to_be_bytes());
        wal.extend(b"bytes");
        assert_eq!(
            WalMessage::parse(wal.into()).unwrap(),
            WalMessage::Wal {
                start: "16/28".parse().unwrap(),
                server_end: "16/1000".parse().unwrap(),
                bytes: Bytes::from_static(b"bytes"),
            }
        );
        let mut keepalive = vec![b'k'];
        keepalive.extend([0; 7]);
        keepalive.extend([9]);
        keepalive.extend([0; 8]);
        keepalive.extend([1]);
        assert_eq!(
            WalMessage::parse(keepalive.into()).unwrap(),
            WalMessage::Keepalive { server_end: Lsn(9), reply: true }
        );
        let mut status = BytesMut::new();
        let sent = StandbyStatus { written: Lsn(3), flushed: Lsn(2), reply: true };
        sent.write(5, &mut status);
        assert_eq!(status.len(), 39);
        assert_eq!((&status[..6], status[13], status[21]), (&b"d\0\0\0\x26r"[..], 3, 2));
        assert_eq!((&status[22..30], status[37], status[38]), (&[0; 8][..], 5, 1));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_refused(body: Vec<u8>) {
            let length = body.len();
            if let Ok(WalMessage::Wal { start, bytes, .. }) = WalMessage::parse(body.into()) {
                prop_assert!(bytes.len() + WAL_HEADER_BYTES + 1 == length);
                prop_assert!(start.checked_add(bytes.len() as u64).is_some());
            }
        }
    }
}
