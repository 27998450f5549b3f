//! `.pgpass`: passwords by host, port, database and user (libpq documentation, 34.16).
//!
//! The first line whose four fields match (a `*` matches all) gives the password. As with libpq, a file that others
//! may read is ignored with a warning rather than trusted or refused, and a missing one is no error.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// No password file is longer; what follows is not read.
const LENGTH_MAX: u64 = 1 << 20;

/// What a password is looked up by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Login<'a> {
    pub(super) host: &'a str,
    pub(super) port: u16,
    pub(super) dbname: &'a str,
    pub(super) user: &'a str,
}

/// Returns the password for `login` from the file at `path`, if the file is there, private and has one.
pub(super) fn look_up(path: &Path, login: Login<'_>) -> Option<String> {
    match read_private(path) {
        Ok(text) => find(&text, login),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "password file is ignored");
            None
        }
    }
}

fn read_private(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a plain file"));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(io::Error::other("group or others have access; its mode should be 0600"));
    }
    let mut text = Vec::new();
    file.take(LENGTH_MAX).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn find(text: &str, login: Login<'_>) -> Option<String> {
    let port = login.port.to_string();
    let wanted = [login.host, &port, login.dbname, login.user];
    let mut lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.find_map(|line| {
        let mut rest = line;
        for want in wanted {
            rest = match_field(rest, want)?;
        }
        Some(field(rest).0)
    })
}

/// Returns what follows the first field if that field matches.
fn match_field<'a>(line: &'a str, want: &str) -> Option<&'a str> {
    if let Some(rest) = line.strip_prefix("*:") {
        return Some(rest);
    }
    let (found, rest) = field(line);
    if found == want { rest } else { None }
}

/// Takes one field up to its colon, in which a backslash makes the next character an ordinary one.
fn field(line: &str) -> (String, Option<&str>) {
    let mut value = String::new();
    let mut characters = line.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => value.extend(characters.next().map(|(_, c)| c)),
            ':' => return (value, Some(&line[at + 1..])),
            c => value.push(c),
        }
    }
    (value, None)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    const LOGIN: Login<'_> = Login { host: "db", port: 5433, dbname: "app", user: "me" };

    #[test]
    fn the_first_matching_line_gives_the_password() {
        let text =
            "# db:5433:app:me:comment\nother:*:*:*:no\ndb:5432:*:*:no\n*:*:app:me:first\ndb:*:*:*:second\n";
        assert_eq!(find(text, LOGIN).as_deref(), Some("first"));
        assert_eq!(find(text, Login { user: "you", ..LOGIN }).as_deref(), Some("second"));
        assert_eq!(find(text, Login { host: "none", user: "you", ..LOGIN }), None);
    }

    #[test]
    fn escapes_protect_colons_in_fields_and_password() {
        let login = Login { host: "fe80::1", ..LOGIN };
        assert_eq!(find(r"fe80\:\:1:5433:app:me:a\:b\\c", login).as_deref(), Some(r"a:b\c"));
        assert_eq!(find("fe80::1:5433:app:me:x", login), None);
        assert_eq!(find("db:5433:app", LOGIN), None, "a short line matches nothing");
        assert_eq!(find("db:5433:app:me:", LOGIN).as_deref(), Some(""));
    }

    #[test]
    fn a_file_that_others_can_read_is_ignored() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("pgpass");
        assert_eq!(look_up(&path, LOGIN), None);
        fs::write(&path, "*:*:*:*:secret\n").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        assert_eq!(look_up(&path, LOGIN), None);
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert_eq!(look_up(&path, LOGIN).as_deref(), Some("secret"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_and_an_escaped_password_is_found_in_it(text in "(?s).{0,60}", password in "[^\r\n]{0,20}") {
            let _ = find(&text, LOGIN);
            let escaped = password.replace('\\', r"\\").replace(':', r"\:");
            let found = find(&format!("db:5433:app:me:{escaped}\n{text}"), LOGIN);
            prop_assert_eq!(found, Some(password));
        }
    }
}
