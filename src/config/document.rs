//! The text of a configuration file, checked against the schema, with the line of everything in it.
//!
//! text → TOML with spans → check of every key, type and word against `schema` → `Table`, from which the sections
//! are read. Whatever is wrong is reported with the first place at which something is wrong, so that one mends a
//! file from the top. Deliberately absent: what the values mean; the readers of the sections know.

use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{Error, Place, Problem, Result};
use super::nearest::nearest;
use super::schema::{Key, ROOT, Section, Value};
use super::table::Table;

/// The file and its text, for turning offsets into lines.
#[derive(Debug)]
pub(super) struct Source<'a> {
    file: &'a Path,
    text: &'a str,
}

impl<'a> Source<'a> {
    pub(super) fn new(file: &'a Path, text: &'a str) -> Self {
        Self { file, text }
    }

    /// Parses the text and checks it against the schema.
    pub(super) fn parse(&self) -> Result<Spanned<DeTable<'a>>> {
        let root = DeTable::parse(self.text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            self.error(at, Problem::Syntax { message: lower_first(error.message()) })
        })?;
        let mut findings = Vec::new();
        check_table(&ROOT, "", root.get_ref(), &mut findings);
        match findings.into_iter().min_by_key(|finding| finding.at) {
            Some(finding) => Err(self.error(finding.at, finding.problem)),
            None => Ok(root),
        }
    }

    /// Returns the file as a table.
    pub(super) fn root(&'a self, table: &'a Spanned<DeTable<'a>>) -> Table<'a> {
        Table::new(self, String::new(), 0, Some(table.get_ref()))
    }

    pub(super) fn file(&self) -> &Path {
        self.file
    }

    pub(super) fn place(&self, at: usize) -> Place {
        let before = &self.text.as_bytes()[..at.min(self.text.len())];
        Place { file: self.file.to_owned(), line: before.iter().filter(|byte| **byte == b'\n').count() + 1 }
    }

    pub(super) fn error(&self, at: usize, problem: Problem) -> Error {
        Error::Content { place: self.place(at), problem }
    }
}

/// Something wrong at an offset of the text.
struct Finding {
    at: usize,
    problem: Problem,
}

fn check_table(section: &'static Section, header: &str, table: &DeTable<'_>, findings: &mut Vec<Finding>) {
    for (name, value) in table {
        let at = name.span().start;
        let name = name.get_ref().as_ref();
        match section.keys.iter().find(|key| key.name == name) {
            Some(Key { value: Value::Later, .. }) => {
                let problem = Problem::NotYet { key: name.to_owned(), section: in_section(header) };
                findings.push(Finding { at, problem });
            }
            Some(key) => check_value(key, header, value, findings),
            None => {
                let problem = Problem::UnknownKey {
                    key: name.to_owned(),
                    section: in_section(header),
                    hint: hint_for_unknown(section, header, name),
                };
                findings.push(Finding { at, problem });
            }
        }
    }
}

fn check_value(key: &'static Key, header: &str, value: &Spanned<DeValue<'_>>, findings: &mut Vec<Finding>) {
    let below = dotted(header, key.name);
    match (key.value, value.get_ref()) {
        (Value::Text | Value::Path | Value::Duration | Value::Size, DeValue::String(_)) => {}
        (Value::Boolean, DeValue::Boolean(_)) | (Value::Integer, DeValue::Integer(_)) => {}
        (Value::Choice(words), DeValue::String(word)) if words.contains(&word.as_ref()) => {}
        (Value::Choice(words), DeValue::String(word)) => {
            let problem = Problem::BadValue {
                key: key.name.to_owned(),
                section: in_section(header),
                reason: format!("\"{word}\" is none of {}", words.join(", ")),
                hint: nearest(word, words.iter().copied()).map(|word| format!("Did you mean \"{word}\"?")),
            };
            findings.push(Finding { at: value.span().start, problem });
        }
        (Value::Texts, DeValue::Array(values)) => {
            let others = values.iter().filter(|value| value.get_ref().as_str().is_none());
            findings.extend(others.map(|other| wrong_type(key, header, other)));
        }
        (Value::Table(section), DeValue::Table(table)) => check_table(section, &below, table, findings),
        (Value::NamedTables(section), DeValue::Table(tables)) => {
            for (name, value) in tables {
                match value.get_ref() {
                    DeValue::Table(table) => {
                        check_table(section, &dotted(&below, name.get_ref()), table, findings);
                    }
                    _ => findings.push(Finding {
                        at: value.span().start,
                        problem: Problem::WrongType {
                            key: name.get_ref().to_string(),
                            section: in_section(&below),
                            expected: "a table",
                            found: describe(value.get_ref()),
                            example: "",
                        },
                    }),
                }
            }
        }
        (Value::Tables(section), DeValue::Array(values)) => {
            for value in values {
                match value.get_ref() {
                    DeValue::Table(table) => check_table(section, &below, table, findings),
                    _ => findings.push(wrong_type(key, header, value)),
                }
            }
        }
        _ => findings.push(wrong_type(key, header, value)),
    }
}

fn wrong_type(key: &Key, header: &str, value: &Spanned<DeValue<'_>>) -> Finding {
    let problem = Problem::WrongType {
        key: key.name.to_owned(),
        section: in_section(header),
        expected: key.value.describe(),
        found: describe(value.get_ref()),
        example: key.example,
    };
    Finding { at: value.span().start, problem }
}

/// Says what to write instead of an unknown key: its neighbour here, or the section that has it.
fn hint_for_unknown(section: &'static Section, header: &str, name: &str) -> String {
    let known = || section.keys.iter().filter(|key| !matches!(key.value, Value::Later)).map(|key| key.name);
    if let Some(home) = home_of(&ROOT, name) {
        return format!("\"{name}\" belongs {}.", in_header(home));
    }
    if let Some(key) = nearest(name, section.keys.iter().map(|key| key.name)) {
        return format!("Did you mean \"{key}\"?");
    }
    let place = if header.is_empty() { "at the top level".to_owned() } else { in_section(header) };
    format!("Known keys {place}: {}.", known().collect::<Vec<_>>().join(", "))
}

/// Finds a section that has a key of exactly this name.
fn home_of(section: &'static Section, name: &str) -> Option<&'static Section> {
    if section.keys.iter().any(|key| key.name == name) {
        return Some(section);
    }
    section.keys.iter().find_map(|key| match key.value {
        Value::Table(below) | Value::NamedTables(below) | Value::Tables(below) => home_of(below, name),
        _ => None,
    })
}

fn in_header(section: &Section) -> String {
    if section.header.is_empty() { "at the top level".to_owned() } else { format!("in {}", section.header) }
}

pub(super) fn in_section(header: &str) -> String {
    if header.is_empty() { "at the top level".to_owned() } else { format!("in [{header}]") }
}

/// Appends a key to a header, quoted where TOML wants it.
pub(super) fn dotted(header: &str, key: &str) -> String {
    let bare = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    let key = if bare { key.to_owned() } else { format!("{key:?}") };
    if header.is_empty() { key } else { format!("{header}.{key}") }
}

fn describe(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a time",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

fn lower_first(message: &str) -> String {
    let mut chars = message.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}
