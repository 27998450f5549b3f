//! `walden clone log`: what PostgreSQL and the mount of a clone have written.
//! Deliberately absent: rotation; a clone's log is as long as the clone's life.

use std::fmt;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::output::{Format, Report};
use super::super::text::TextStyle;
use super::existing;

/// Shows the end of a clone's log
#[derive(Debug, Args)]
pub(super) struct CloneLog {
    /// The name of the clone
    name: String,
    /// Goes on showing what is written
    #[arg(short, long)]
    follow: bool,
    /// Shows the mount's log instead of PostgreSQL's
    #[arg(long)]
    mount: bool,
}

/// The end of a log that is shown.
const TAIL_BYTES: u64 = 64 << 10;
const FOLLOW_POLL: Duration = Duration::from_millis(200);

#[derive(Debug, Serialize)]
struct LogReport {
    file: PathBuf,
    lines: Vec<String>,
}

impl CloneLog {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        if self.follow && context.output.format() == Format::Json {
            let message = "a log that goes on is no JSON document";
            return Err(CommandError::usage(message).hint("Follow it as text, or leave out --follow."));
        }
        let folder = existing(context, &self.name)?;
        let file = if self.mount { folder.mount_log() } else { folder.server_log() };
        let (mut text, mut end) = read_from(&file, None, self.follow)?;
        loop {
            let lines = text.lines().map(str::to_owned).collect();
            context.output.print(&LogReport { file: file.clone(), lines })?;
            if !self.follow || !context.output.has_reader() {
                return Ok(());
            }
            loop {
                std::thread::sleep(FOLLOW_POLL);
                (text, end) = read_from(&file, Some(end), true)?;
                if !text.is_empty() {
                    break;
                }
            }
        }
    }
}

/// Reads from `start`, or the end of the log, and of `whole_lines` only those that are written to their end; returns where
/// it stopped.
fn read_from(path: &Path, start: Option<u64>, whole_lines: bool) -> Result<(String, u64), CommandError> {
    let failed = |error: std::io::Error| {
        CommandError::failed(format!("could not read \"{}\": {error}", path.display()))
    };
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((String::new(), 0)),
        Err(error) => return Err(failed(error)),
    };
    let length = file.metadata().map_err(failed)?.len();
    // One that is shorter than it was has begun anew.
    let start = start.filter(|start| *start <= length);
    let start = start.unwrap_or_else(|| length.saturating_sub(TAIL_BYTES));
    file.seek(SeekFrom::Start(start)).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    if whole_lines {
        let lines = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        let is_endless = lines == 0 && bytes.len() as u64 == TAIL_BYTES;
        bytes.truncate(if is_endless { bytes.len() } else { lines });
    }
    let end = start + bytes.len() as u64;
    Ok((String::from_utf8_lossy(&bytes).into_owned(), end))
}

impl Report for LogReport {
    fn write_text(&self, out: &mut String, _: &TextStyle) -> fmt::Result {
        for line in &self.lines {
            out.push_str(line);
            out.push('\n');
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_log_is_followed_by_whole_lines_and_through_a_new_beginning() {
        let scratch = tempfile::tempdir().unwrap();
        let log = scratch.path().join("server.log");
        let read = |start| read_from(&log, start, true).unwrap();
        assert_eq!(read(None), (String::new(), 0), "there is none yet");
        fs::write(&log, "one\ntw").unwrap();
        assert_eq!(read_from(&log, None, false).unwrap(), ("one\ntw".to_owned(), 6));
        assert_eq!(read(Some(0)), ("one\n".to_owned(), 4));
        fs::write(&log, "one\ntwo\n").unwrap();
        assert_eq!(read(Some(4)), ("two\n".to_owned(), 8));
        assert_eq!(read(Some(8)), (String::new(), 8));
        fs::write(&log, "new\n").unwrap();
        assert_eq!(read(Some(8)), ("new\n".to_owned(), 4), "it was emptied meanwhile");
        fs::write(&log, "x".repeat(2 * TAIL_BYTES as usize)).unwrap();
        assert_eq!(read(Some(4)).1, 4 + TAIL_BYTES, "a line without end is shown in pieces");
    }
}
