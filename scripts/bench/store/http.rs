//! As much of HTTP/1.1 as S3 clients speak: requests with a length, answers with a length, connections kept open.

use std::collections::HashMap;
use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A request, its body received.
#[derive(Debug)]
pub struct Request {
    /// `GET` and the like.
    pub method: String,
    /// Without the query, decoded.
    pub path: String,
    /// Names and values, decoded; a name without a value has an empty one.
    pub query: HashMap<String, String>,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    /// The body.
    pub body: Vec<u8>,
}

/// An answer.
#[derive(Debug, Default)]
pub struct Answer {
    /// The status and its words.
    pub status: &'static str,
    /// Further headers.
    pub headers: Vec<(&'static str, String)>,
    /// The length that is announced where no body follows, as to a HEAD.
    pub announced: Option<usize>,
    /// The body.
    pub body: bytes::Bytes,
}

const HEAD_BYTES_MAX: usize = 64 << 10;
const BODY_BYTES_MAX: usize = 1 << 30;

/// Receives the next request; none where the client has closed the connection.
pub async fn receive<S: AsyncReadExt + Unpin>(
    stream: &mut S,
    rest: &mut Vec<u8>,
) -> io::Result<Option<Request>> {
    let end = loop {
        if let Some(at) = rest.windows(4).position(|four| four == b"\r\n\r\n") {
            break at;
        }
        if rest.len() > HEAD_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if stream.read_buf(rest).await? == 0 {
            return Ok(None);
        }
    };
    let head = String::from_utf8_lossy(&rest[..end]).into_owned();
    rest.drain(..end + 4);
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length = headers.get("content-length").map_or(Ok(0), |length| length.parse::<usize>());
    let length = length.ok().filter(|length| *length <= BODY_BYTES_MAX).ok_or(io::ErrorKind::InvalidData)?;
    let mut body = std::mem::take(rest);
    if body.len() > length {
        *rest = body.split_off(length);
    }
    body.reserve_exact(length - body.len());
    while body.len() < length {
        if (&mut *stream).take((length - body.len()) as u64).read_buf(&mut body).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = query.split('&').filter(|part| !part.is_empty()).map(|part| {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        (decode(name), decode(value))
    });
    Ok(Some(Request { method, path: decode(path), query: query.collect(), headers, body }))
}

/// Sends an answer.
pub async fn send<S: AsyncWriteExt + Unpin>(stream: &mut S, answer: &Answer) -> io::Result<()> {
    let length = answer.announced.unwrap_or(answer.body.len());
    let mut head = format!("HTTP/1.1 {}\r\nContent-Length: {length}\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(&answer.body).await?;
    stream.flush().await
}

fn decode(text: &str) -> String {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        let hex = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16)).unwrap_or(0) as u8;
        decoded.push(match byte {
            b'%' => hex(bytes.next()) << 4 | hex(bytes.next()),
            byte => byte,
        });
    }
    String::from_utf8_lossy(&decoded).into_owned()
}
