//! What `postgresql.conf` needs for a site: the lines, quoted for every reader on the way, and what they take.
//!
//! An archive_command is read by PostgreSQL's configuration (quotes, backslashes), by PostgreSQL (`%`) and by a shell.

use std::path::PathBuf;

use serde::Serialize;

use crate::backup::ServerFacts;

/// The command by which a server archives into a site; absolute, because a server has its own working directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveCommand {
    /// The walden binary.
    pub binary: PathBuf,
    /// The configuration file.
    pub configuration: PathBuf,
    /// The site's name.
    pub site: String,
}

/// A setting as the site needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// Its name.
    pub name: &'static str,
    /// The value the site needs.
    pub value: String,
    /// The value in force; `None` where no server was asked.
    pub current: Option<String>,
    /// What a change takes: `restart`, `reload`, or `nothing` where the value is in force.
    pub takes: &'static str,
}

impl ArchiveCommand {
    /// Returns the command as `archive_command` takes it.
    pub fn value(&self) -> String {
        let quoted = |text: &str| shell_word(&text.replace('%', "%%"));
        let (binary, configuration) = (self.binary.to_string_lossy(), self.configuration.to_string_lossy());
        let site = quoted(&self.site);
        format!("{} --config {} --site {site} wal push \"%p\"", quoted(&binary), quoted(&configuration))
    }
}

impl Setting {
    /// Returns the line for `postgresql.conf`.
    pub fn line(&self) -> String {
        let plain = self.value.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if plain {
            return format!("{} = {}", self.name, self.value);
        }
        let quoted = self.value.replace('\\', "\\\\").replace('\'', "''");
        format!("{} = '{quoted}'", self.name)
    }
}

/// Returns the settings that a server needs, compared with those it has where it answered; without a command those of
/// one whose WAL is received.
pub fn wanted_settings(command: Option<&ArchiveCommand>, facts: Option<&ServerFacts>) -> Vec<Setting> {
    let current = |name: &str| facts.map(|facts| facts.setting(name).unwrap_or_default().to_owned());
    let kept = |name: &str, good: &[&str], wanted: &str| {
        let current = current(name);
        current.filter(|value| good.contains(&value.as_str())).unwrap_or_else(|| wanted.to_owned())
    };
    let mut wanted = vec![("wal_level", kept("wal_level", &["replica", "logical"], "replica"), "restart")];
    if let Some(command) = command {
        wanted.push(("archive_mode", kept("archive_mode", &["on", "always"], "on"), "restart"));
        wanted.push(("archive_command", command.value(), "reload"));
    }
    let compared = wanted.into_iter().map(|(name, value, change)| {
        let current = current(name);
        let takes = if current.as_ref() == Some(&value) { "nothing" } else { change };
        Setting { name, value, current, takes }
    });
    compared.collect()
}

/// Quotes a word for a shell where it has to be.
fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(binary: &str, configuration: &str) -> ArchiveCommand {
        ArchiveCommand { binary: binary.into(), configuration: configuration.into(), site: "main".to_owned() }
    }

    #[test]
    fn a_command_is_quoted_for_every_reader_on_its_way() {
        let plain = command("/usr/bin/walden", "/etc/walden/walden.toml");
        let settings = wanted_settings(Some(&plain), None);
        let lines: Vec<String> = settings.iter().map(Setting::line).collect();
        assert_eq!(
            lines,
            [
                "wal_level = replica",
                "archive_mode = on",
                "archive_command = '/usr/bin/walden --config /etc/walden/walden.toml --site main wal push \"%p\"'",
            ]
        );
        assert!(settings.iter().all(|setting| setting.current.is_none()));
        let odd = command("/opt/it's 100%/walden", "/etc/a\\b.toml");
        assert_eq!(
            wanted_settings(Some(&odd), None)[2].line(),
            "archive_command = '''/opt/it''\\\\''''s 100%%/walden'' --config ''/etc/a\\\\b.toml'' --site main \
             wal push \"%p\"'"
        );
        let received = wanted_settings(None, None);
        assert_eq!(received.iter().map(Setting::line).collect::<Vec<_>>(), ["wal_level = replica"]);
    }
}
