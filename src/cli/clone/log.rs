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
use super::super::output::Report;
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
        let folder = existing(context, &self.name)?;
        let file = if self.mount { folder.mount_log() } else { folder.server_log() };
        let (mut text, mut end) = read_from(&file, None)?;
        loop {
            let lines = text.lines().map(str::to_owned).collect();
            context.output.print(&LogReport { file: file.clone(), lines })?;
            if !self.follow {
                return Ok(());
            }
            loop {
                std::thread::sleep(FOLLOW_POLL);
                (text, end) = read_from(&file, Some(end))?;
                if !text.is_empty() {
                    break;
                }
            }
        }
    }
}

/// Reads from `start`, or the end of the log; returns where it stopped.
fn read_from(path: &Path, start: Option<u64>) -> Result<(String, u64), CommandError> {
    let failed = |error: std::io::Error| {
        CommandError::failed(format!("could not read \"{}\": {error}", path.display()))
    };
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((String::new(), 0)),
        Err(error) => return Err(failed(error)),
    };
    let length = file.metadata().map_err(failed)?.len();
    let start = start.unwrap_or_else(|| length.saturating_sub(TAIL_BYTES));
    file.seek(SeekFrom::Start(start)).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes).map_err(failed)?;
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
