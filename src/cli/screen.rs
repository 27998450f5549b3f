//! Standard error, shared by log lines and the line of progress.
//!
//! Progress is one line that is drawn over itself; a log line wipes it first, and the next tick draws it again
//! below. Both come through one lock, so neither ends up inside the other.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

/// Returns to the first column and wipes the line (ECMA-48 EL).
const WIPE: &str = "\r\x1b[K";

/// Whether a line of progress is on the screen.
static PROGRESS_SHOWN: Mutex<bool> = Mutex::new(false);

/// Draws a line of progress over the last one; an empty one wipes it.
pub(super) fn draw_progress(line: &str) {
    let mut shown = PROGRESS_SHOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if line.is_empty() && !*shown {
        return;
    }
    // A terminal that is gone must not stop a backup.
    let _ = write!(io::stderr().lock(), "{WIPE}{line}").and_then(|()| io::stderr().flush());
    *shown = !line.is_empty();
}

/// Standard error for log lines.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes).map(|()| bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut shown = PROGRESS_SHOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stderr = io::stderr().lock();
        if std::mem::take(&mut *shown) {
            stderr.write_all(WIPE.as_bytes())?;
        }
        stderr.write_all(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
