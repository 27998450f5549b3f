//! Walden's own commands, run as their users run them: a process each, JSON back.
//!
//! Every program gets an environment of its own, so that nothing of the caller's set-up decides the outcome, and a
//! process group of its own, so that Ctrl-C reaches the demonstration alone and it can end things in order.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde::de::DeserializeOwned;
use tokio::process::Command;

use crate::instance::demo::error::DemoError;
use crate::instance::demo::scratch::Account;

/// Enough for sh, cp, test and fusermount3; PostgreSQL's programs are named in full.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The binary with its configuration.
#[derive(Debug, Clone)]
pub(super) struct Walden {
    pub(super) binary: PathBuf,
    pub(super) config: PathBuf,
    pub(super) home: PathBuf,
    pub(super) account: Account,
}

/// Who runs a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum As {
    /// Whoever runs the demonstration.
    Caller,
    /// Whoever runs the server.
    Server,
}

impl Walden {
    /// Runs a command and reads its document.
    pub(super) async fn run<T: DeserializeOwned>(&self, who: As, arguments: &[&str]) -> Result<T, DemoError> {
        let mut command = self.command(who);
        command.args(["--output", "json"]).args(arguments).current_dir(&self.home);
        self.document(command, arguments).await
    }

    /// Runs a command that needs no configuration in a folder, and reads its document.
    pub(super) async fn run_in<T: DeserializeOwned>(
        &self,
        folder: &Path,
        arguments: &[&str],
    ) -> Result<T, DemoError> {
        let mut command = program(&self.binary, Some(&self.account), &self.home);
        command.args(["--output", "json"]).args(arguments).current_dir(folder);
        self.document(command, arguments).await
    }

    /// Runs a command whose output is another program's.
    pub(super) async fn run_text(&self, who: As, arguments: &[&str]) -> Result<String, DemoError> {
        let mut command = self.command(who);
        command.args(arguments).current_dir(&self.home);
        run(command, &named(arguments)).await
    }

    /// Returns the archive_command.
    pub(super) fn archive_command(&self) -> String {
        let quoted = |path: &Path| shell_word(&path.display().to_string()).replace('%', "%%");
        format!("{} --config {} wal push %p", quoted(&self.binary), quoted(&self.config))
    }

    fn command(&self, who: As) -> Command {
        let account = (who == As::Server).then_some(&self.account);
        let mut command = program(&self.binary, account, &self.home);
        command.arg("--config").arg(&self.config);
        command
    }

    async fn document<T: DeserializeOwned>(
        &self,
        command: Command,
        arguments: &[&str],
    ) -> Result<T, DemoError> {
        let command_line = named(arguments);
        let text = run(command, &command_line).await?;
        serde_json::from_str(&text)
            .map_err(|error| DemoError::Document { command: command_line, detail: error.to_string() })
    }
}

/// Prepares a program: nothing inherited, killed when its future is dropped.
pub(super) fn program(file: impl AsRef<OsStr>, account: Option<&Account>, home: &Path) -> Command {
    let mut command = std::process::Command::new(file);
    command.env_clear().env("PATH", PATH).env("HOME", home).env("LC_ALL", "C").env("TZ", "UTC");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    if let Some(account) = account.filter(|account| account.is_other()) {
        command.uid(account.owner.uid).gid(account.owner.gid);
    }
    let mut command = Command::from(command);
    command.kill_on_drop(true);
    command
}

/// Runs a program to its end and returns what it printed.
pub(super) async fn run(mut command: Command, name: &str) -> Result<String, DemoError> {
    let spawned = command.output().await;
    let output = spawned.map_err(|source| DemoError::Spawn { command: name.to_owned(), source })?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    if output.status.success() {
        return Ok(text(output.stdout));
    }
    Err(DemoError::Command { command: name.to_owned(), status: output.status, said: text(output.stderr) })
}

/// Quotes a word for the shell.
fn shell_word(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn named(arguments: &[&str]) -> String {
    let words = arguments.iter().take_while(|word| !word.starts_with('-'));
    words.fold("walden".to_owned(), |name, word| format!("{name} {word}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Owner;

    fn walden(binary: &str) -> Walden {
        let account = Account { name: "me".to_owned(), owner: Owner::current() };
        Walden { binary: binary.into(), config: "/tmp/it's/50%.toml".into(), home: "/".into(), account }
    }

    #[test]
    fn the_archive_command_survives_the_shell_and_the_server() {
        assert_eq!(
            walden("/opt/walden").archive_command(),
            r"'/opt/walden' --config '/tmp/it'\''s/50%%.toml' wal push %p"
        );
    }

    #[tokio::test]
    async fn a_failing_command_is_told_with_its_last_words_and_without_its_options() {
        let sh = walden("/bin/sh");
        let error = sh.run_in::<serde_json::Value>(Path::new("/"), &["none", "x", "--secret"]).await;
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with("walden none x failed (exit status: 2)"), "{error}");
        let error = walden("/no/binary").run_text(As::Caller, &["list"]).await.unwrap_err().to_string();
        assert!(error.starts_with("could not run walden list: "), "{error}");
    }

    #[tokio::test]
    async fn what_is_no_document_is_told() {
        let echo = walden("/bin/echo");
        let error = echo.run::<serde_json::Value>(As::Caller, &["wal", "list"]).await.unwrap_err();
        assert!(error.to_string().starts_with("walden wal list printed no usable JSON: "), "{error}");
    }
}
