//! `docs/configuration.md`, written from the schema, so that what is documented is what is accepted.
//!
//! `WALDEN_UPDATE_DOCS=1 cargo nextest run reference` writes the document; without it the test compares. A second test
//! sets every key alone and looks whether the `Config` changes: a key that does nothing cannot come in.

use std::fmt::Write;
use std::path::Path;

use super::schema::{Key, ROOT, Section, Value};
use super::*;

const INTRODUCTION: &str = "\
# Configuration

<!-- Written from src/config/schema.rs by a test; change it there and run it with WALDEN_UPDATE_DOCS=1. -->

One TOML file: the one named by `--config`, else by `WALDEN_CONFIG`, else `./walden.toml`, else
`/etc/walden/walden.toml`. Relative paths are relative to the file. A key that is not listed here is refused, also when
a later release will have it. Durations are whole numbers with `ms`, `s`, `min`, `h` or `d`; sizes with `B`, `KiB`,
`MiB`, `GiB` or `TiB`.

Files that hold a secret (private keys, `secret_access_key_file`, and the configuration file itself where a secret or a
password stands in it) are refused unless their mode is 0600, or 0640 and root's.

The smallest one:

```toml
[storage]
url = \"file:///var/lib/walden/repo\"

[sites.main]
connection = \"host=/run/postgresql user=walden\"
```
";

fn reference() -> String {
    let mut text = INTRODUCTION.to_owned();
    write_section(&mut text, &ROOT).unwrap();
    text
}

fn write_section(out: &mut String, section: &'static Section) -> std::fmt::Result {
    let keys = || section.keys.iter().filter(|key| is_leaf(key));
    if !section.header.is_empty() {
        writeln!(out, "\n## `{}`\n\n{}\n", section.header, section.about)?;
        if section.header == "[sites.NAME.storage]" {
            return writeln!(out, "The keys are those of `[storage]`.");
        }
        writeln!(out, "| key | without it | meaning |\n|---|---|---|")?;
        for key in keys() {
            writeln!(out, "| `{} = {}` | {} | {} |", key.name, key.example, key.default, key.about)?;
        }
    }
    for key in section.keys {
        if let Value::Table(below) | Value::NamedTables(below) | Value::Tables(below) = key.value {
            write_section(out, below)?;
        }
    }
    Ok(())
}

fn is_leaf(key: &Key) -> bool {
    !matches!(key.value, Value::Table(_) | Value::NamedTables(_) | Value::Tables(_) | Value::Later)
}

#[test]
fn the_document_is_the_schema() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    if std::env::var_os("WALDEN_UPDATE_DOCS").is_some() {
        std::fs::write(&path, reference()).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == reference(),
        "docs/configuration.md is not what the schema says: run this test with WALDEN_UPDATE_DOCS=1"
    );
}

/// Everything that an example of a key needs around it, with other values than the examples have.
const AROUND: &str = r#"
storage = { url = "s3://other", access_key_id = "x", secret_access_key = "y" }
limits = { threads = 1, transfers = 1, memory = "64MiB" }
[encryption.keys.2026-11]
public_key_file = "1"
private_key_file = "2"
signing_key_file = "3"
verify_key_file = "4"
[encryption.keys.standby]
[encryption]
recipients = ["standby"]
[sites.main]
"#;

/// Where a section with this header stands in a file.
fn place_of(header: &str) -> Vec<&str> {
    let path = header.trim_matches(['[', ']']).split('.');
    path.map(|part| match part {
        "NAME" => "main",
        "ID" => "2026-11",
        other => other,
    })
    .collect()
}

fn parse(document: &toml::Table) -> Config {
    let text = toml::to_string(document).unwrap();
    let file = Path::new("/etc/walden/walden.toml");
    Config::parse(&text, file, &Environment::of(0, &[])).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// Returns the table of a section, created if need be; of several, the first.
fn table_of<'a>(document: &'a mut toml::Table, section: &Section) -> &'a mut toml::Table {
    let mut table = document;
    for part in place_of(section.header) {
        let several = part == "nodes";
        let new = || if several { toml::Value::Array(Vec::new()) } else { toml::Table::new().into() };
        let value = table.entry(part).or_insert_with(new);
        table = match value {
            toml::Value::Table(table) => table,
            toml::Value::Array(tables) => {
                if tables.is_empty() {
                    tables.push(toml::Table::from_iter([("connection".to_owned(), "host=x".into())]).into());
                }
                tables[0].as_table_mut().unwrap()
            }
            other => panic!("{part} is {other}"),
        };
    }
    table
}

fn check_section(section: &'static Section, checked: &mut usize) {
    for key in section.keys {
        if let Value::Table(below) | Value::NamedTables(below) | Value::Tables(below) = key.value {
            check_section(below, checked);
        }
        if !is_leaf(key) {
            continue;
        }
        let mut without: toml::Table = AROUND.parse().unwrap();
        let table = table_of(&mut without, section);
        if section.header == "[sites.NAME.storage]" {
            *table = "url = 's3://other'\naccess_key_id = 'x'\nsecret_access_key = 'y'".parse().unwrap();
        }
        if key.name == "secret_access_key_file" {
            table.remove("secret_access_key");
            table.insert("secret_access_key_file".to_owned(), "x".into());
        }
        let mut with = without.clone();
        let value: toml::Table = format!("{} = {}", key.name, key.example).parse().unwrap();
        table_of(&mut with, section).extend(value);
        assert!(parse(&without) != parse(&with), "{} in {} changes nothing", key.name, section.header);
        *checked += 1;
    }
}

#[test]
fn every_key_does_something() {
    let mut checked = 0;
    check_section(&ROOT, &mut checked);
    assert!(checked > 40, "only {checked} keys were looked at");
}
