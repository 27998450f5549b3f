//! A program run to its end: what it printed and how it ended.

use std::io::Write;
use std::process::{Command, ExitStatus, Stdio};

/// A program's exit and all it wrote.
#[derive(Debug, Clone)]
pub struct Run {
    pub command: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    /// Runs a command to its end with `stdin` as its input.
    #[track_caller]
    pub fn of(command: &mut Command, stdin: &str) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let text = format!("{command:?}");
        let mut process = command.spawn().unwrap_or_else(|error| panic!("{text}: {error}"));
        // A program may end without reading its input; its exit tells.
        let _ = process.stdin.take().map(|mut input| input.write_all(stdin.as_bytes()));
        let output = process.wait_with_output().unwrap();
        let text_of = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self {
            command: text,
            status: output.status,
            stdout: text_of(output.stdout),
            stderr: text_of(output.stderr),
        }
    }

    /// Says whether the exit status was 0.
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// Returns the exit status; none if a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Panics with everything it printed, unless the exit status was 0.
    #[track_caller]
    pub fn expect_success(self) -> Self {
        self.expect_code(0)
    }

    /// Panics with everything it printed, unless the exit status was `code`.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        let Self { command, status, stdout, stderr } = &self;
        assert_eq!(status.code(), Some(code), "{command}: {status}, wanted {code}\n{stdout}\n{stderr}");
        self
    }
}
