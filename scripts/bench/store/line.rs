//! A line: what enters at one end leaves the other after a delay, and no faster than its width.
//!
//! Each direction of each connection has a width of its own, as between a host and a store of many machines; no
//! packet is lost and there is no slow start. Opening a connection costs a round trip, as the handshake of TCP does.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// How long and how wide.
#[derive(Debug, Clone, Copy)]
pub struct Line {
    /// From one end to the other.
    pub delay: Duration,
    /// In each direction.
    pub bytes_per_second: u64,
}

/// Read from a socket at a time.
const PIECE_BYTES: usize = 64 << 10;
/// Shorter pauses are not made, and made up for by a later one; so much of the width may be saved up, too.
const TICKS: Duration = Duration::from_millis(2);
/// More than what is on a line of a gigabit a second and ten milliseconds, even in small pieces.
const PIECES_UNDER_WAY_MAX: usize = 256;

impl Line {
    /// Returns the far end of a connection that goes over this line.
    pub fn stretch(self, socket: TcpStream) -> DuplexStream {
        let (near, far) = duplex(16 * PIECE_BYTES);
        let (from_client, to_client) = socket.into_split();
        let (from_server, to_server) = tokio::io::split(near);
        tokio::spawn(self.carry(from_client, to_server, 2 * self.delay));
        tokio::spawn(self.carry(from_server, to_client, Duration::ZERO));
        far
    }

    async fn carry<R, W>(self, mut from: R, mut to: W, opening: Duration)
    where
        R: AsyncReadExt + Unpin + Send + 'static,
        W: AsyncWriteExt + Unpin + Send + 'static,
    {
        let (sender, mut under_way) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES_UNDER_WAY_MAX);
        let entering = async move {
            let mut free_at = Instant::now() + opening;
            loop {
                let mut piece = Vec::with_capacity(PIECE_BYTES);
                match from.read_buf(&mut piece).await {
                    Ok(1..) => {}
                    Ok(0) | Err(_) => return,
                }
                let takes = Duration::from_secs_f64(piece.len() as f64 / self.bytes_per_second as f64);
                free_at = free_at.max(Instant::now() - 2 * TICKS) + takes;
                // Not read faster than the line is wide: the sender is to feel it. Timers tick in milliseconds.
                if free_at > Instant::now() + TICKS {
                    sleep_until(free_at).await;
                }
                if sender.send((free_at.max(Instant::now()) + self.delay, piece)).await.is_err() {
                    return;
                }
            }
        };
        let leaving = async move {
            while let Some((at, piece)) = under_way.recv().await {
                sleep_until(at).await;
                if to.write_all(&piece).await.is_err() {
                    return;
                }
            }
            let _ = to.shutdown().await;
        };
        tokio::join!(entering, leaving);
    }
}
