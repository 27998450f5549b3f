//! The settings of a server that decide whether its backups are worth anything, each judged by its value alone.
//! *Failed* is what no basebackup can be taken with; a *warning* is what makes one worth less.

use crate::backup::ServerFacts;
use crate::site::item::Item;

/// Judges the settings of a server; those of its archiver not where WAL is received.
pub(super) fn check_settings(facts: &ServerFacts, site: &str, received: bool) -> Vec<Item> {
    let value = |name| facts.setting(name).unwrap_or_default();
    let standby = facts.identity.in_recovery;
    let mut items = vec![wal_level(value("wal_level"))];
    if !received {
        items.push(archive_mode(value("archive_mode"), standby));
        items.push(archive_command(value("archive_command"), value("archive_library"), site));
    }
    items.push(full_page_writes(value("full_page_writes")));
    items.push(data_checksums(facts.data_checksums));
    items
}

fn wal_level(value: &str) -> Item {
    match value {
        "replica" | "logical" => Item::ok("wal_level", value),
        _ => Item::failed(
            "wal_level",
            value,
            "Set wal_level = replica in postgresql.conf and restart the server.",
        ),
    }
}

fn archive_mode(value: &str, standby: bool) -> Item {
    match (value, standby) {
        ("always", _) | ("on", false) => Item::ok("archive_mode", value),
        ("on", true) => Item::ok("archive_mode", "on: this standby archives once it is promoted"),
        _ => Item::failed(
            "archive_mode",
            value,
            "Set archive_mode = on in postgresql.conf and restart the server.",
        ),
    }
}

/// Tells from the text of an archive_command whether it is ours, as far as a text can tell.
fn archive_command(value: &str, library: &str, site: &str) -> Item {
    let name = "archive_command";
    let hint = "`walden site init` prints the line for postgresql.conf; reload the server after the change.";
    if !library.is_empty() {
        let detail = format!("archive_library = \"{library}\" takes its place");
        return Item::warning(name, detail, hint);
    }
    // What PostgreSQL shows while archive_mode is off.
    if value.is_empty() || value == "(disabled)" {
        let detail = if value.is_empty() { "empty" } else { "not in force, as archive_mode is off" };
        return if value.is_empty() { Item::failed(name, detail, hint) } else { Item::skipped(name, detail) };
    }
    if !value.contains("wal push") || !value.contains("%p") {
        return Item::warning(name, format!("`{value}` does not call walden wal push"), hint);
    }
    match site_named_in(value) {
        Some(other) if other != site => {
            Item::warning(name, format!("`{value}` archives into site \"{other}\", not \"{site}\""), hint)
        }
        _ => Item::ok(name, format!("`{value}`")),
    }
}

/// Returns the site that a command line names, if it does.
fn site_named_in(command: &str) -> Option<&str> {
    let mut words = command.split_whitespace();
    while let Some(word) = words.next() {
        let site = match word.strip_prefix("--site") {
            Some("") => words.next(),
            Some(rest) => rest.strip_prefix('='),
            None => None,
        };
        if let Some(site) = site {
            return Some(site.trim_matches(['\'', '"']));
        }
    }
    None
}

fn full_page_writes(value: &str) -> Item {
    let name = "full_page_writes";
    if value == "on" {
        return Item::ok(name, value);
    }
    // PostgreSQL forces them while a backup from a primary runs.
    Item::warning(name, value, "Switch it on: after a crash, pages that were half written stay so.")
}

fn data_checksums(on: bool) -> Item {
    if on {
        return Item::ok("data checksums", "on");
    }
    let hint =
        "With `pg_checksums --enable`, on a stopped server, backups notice pages that the disk has damaged.";
    Item::warning("data checksums", "off", hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::site::Status;

    #[test]
    fn every_value_gets_its_verdict() {
        let (ok, warning, failed) = (Status::Ok, Status::Warning, Status::Failed);
        for (value, status) in [("replica", ok), ("logical", ok), ("minimal", failed)] {
            assert_eq!(wal_level(value).status, status, "{value}");
        }
        for (value, standby, status) in
            [("on", false, ok), ("on", true, ok), ("always", true, ok), ("off", false, failed)]
        {
            assert_eq!(archive_mode(value, standby).status, status, "{value}");
        }
        let command = |value| archive_command(value, "", "main").status;
        for (value, status) in [
            ("walden wal push %p", ok),
            ("/usr/bin/walden --config /etc/w.toml --site main wal push \"%p\"", ok),
            ("walden --site=main wal push %p", ok),
            ("walden --site 'other' wal push %p", warning),
            ("walden --site=other wal push %p", warning),
            ("walden wal push pg_wal/%f", warning),
            ("cp %p /archive/%f", warning),
            ("false", warning),
            ("", failed),
            ("(disabled)", Status::Skipped),
        ] {
            assert_eq!(command(value), status, "{value}");
        }
        assert_eq!(archive_command("walden wal push %p", "basic_archive", "main").status, warning);
        assert_eq!(full_page_writes("off").status, warning);
        assert_eq!(data_checksums(false).status, warning);
    }
}
