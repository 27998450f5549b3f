//! A table of a checked file, from which a section's reader takes its values.
//!
//! Types were checked before, so a value of another type reads as if it were not there. What only the reader of
//! a section can tell (a bad URL, a name that leads nowhere) is complained of through the [`Entry`], which knows
//! its place.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::document::{Source, dotted, in_section};
use super::error::{Error, Place, Problem, Result};
use super::units::{UnitError, parse_duration, parse_size};

/// A table, which may as well not be there; then it has no values.
#[derive(Debug, Clone)]
pub(super) struct Table<'a> {
    source: &'a Source<'a>,
    header: String,
    at: usize,
    entries: Option<&'a DeTable<'a>>,
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Entry<'a, T> {
    pub value: T,
    source: &'a Source<'a>,
    key: String,
    header: String,
    at: usize,
}

impl<'a> Table<'a> {
    pub(super) fn new(
        source: &'a Source<'a>,
        header: String,
        at: usize,
        entries: Option<&'a DeTable<'a>>,
    ) -> Self {
        Self { source, header, at, entries }
    }

    pub(super) fn is_present(&self) -> bool {
        self.entries.is_some()
    }

    pub(super) fn place(&self) -> Place {
        self.source.place(self.at)
    }

    pub(super) fn text(&self, key: &str) -> Option<Entry<'a, String>> {
        let value = self.get(key)?;
        Some(self.entry(key, value, value.get_ref().as_str()?.to_owned()))
    }

    pub(super) fn texts(&self, key: &str) -> Option<Vec<Entry<'a, String>>> {
        let values = self.get(key)?.get_ref().as_array()?;
        Some(
            values
                .iter()
                .filter_map(|value| Some(self.entry(key, value, value.get_ref().as_str()?.to_owned())))
                .collect(),
        )
    }

    pub(super) fn boolean(&self, key: &str) -> Option<bool> {
        self.get(key)?.get_ref().as_bool()
    }

    /// Returns a path, resolved against the folder of the configuration file.
    pub(super) fn path(&self, key: &str) -> Result<Option<PathBuf>> {
        let Some(entry) = self.text(key) else { return Ok(None) };
        if entry.value.is_empty() {
            return Err(entry.bad("the path is empty", None));
        }
        if entry.value.starts_with('~') {
            return Err(entry.bad(
                format!("\"{}\" begins with ~, which only a shell understands", entry.value),
                Some("Write the path in full.".to_owned()),
            ));
        }
        let folder = self.source.file().parent().unwrap_or(Path::new(""));
        let path = folder.join(&entry.value);
        // Whoever changes the working directory later must still find the file.
        std::path::absolute(&path).map(Some).map_err(|source| Error::Unreadable {
            what: "the current directory for",
            path,
            source,
        })
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<Entry<'a, i64>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Some(integer) = value.get_ref().as_integer() else { return Ok(None) };
        match i64::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(number) => Ok(Some(self.entry(key, value, number))),
            Err(_) => Err(self.entry(key, value, ()).bad("the number is too large", None)),
        }
    }

    pub(super) fn duration(&self, key: &str) -> Result<Option<Entry<'a, Duration>>> {
        self.parsed(key, parse_duration)
    }

    pub(super) fn size(&self, key: &str) -> Result<Option<Entry<'a, u64>>> {
        self.parsed(key, parse_size)
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Returns the place of a key, for a complaint that its value alone does not justify.
    pub(super) fn at(&self, key: &str) -> Entry<'a, ()> {
        let at = self.get(key).map_or(self.at, |value| value.span().start);
        Entry { value: (), source: self.source, key: key.to_owned(), header: self.header.clone(), at }
    }

    /// Returns the table below a key; an empty one if it is not there.
    pub(super) fn table(&self, key: &str) -> Table<'a> {
        let value = self.get(key);
        let entries = value.and_then(|value| value.get_ref().as_table());
        let at = value.map_or(self.at, |value| value.span().start);
        Table { source: self.source, header: dotted(&self.header, key), at, entries }
    }

    /// Returns the tables below a key, each with the name that the user chose.
    pub(super) fn named_tables(&self, key: &str) -> Vec<(Entry<'a, String>, Table<'a>)> {
        let below = self.table(key);
        let names = below.entries.into_iter().flatten();
        let mut tables: Vec<_> = names
            .map(|(name, _)| {
                let at = name.span().start;
                let text = name.get_ref().to_string();
                let header = below.header.clone();
                let entry = Entry { value: text.clone(), source: self.source, key: text.clone(), header, at };
                (entry, Table { at, ..below.table(&text) })
            })
            .collect();
        tables.sort_by_key(|(entry, _)| entry.at);
        tables
    }

    /// Returns the tables of an array of tables.
    pub(super) fn tables(&self, key: &str) -> Vec<Table<'a>> {
        let values = self.get(key).and_then(|value| value.get_ref().as_array());
        let header = dotted(&self.header, key);
        let table = |value: &'a Spanned<DeValue<'a>>| {
            let entries = value.get_ref().as_table();
            Table { source: self.source, header: header.clone(), at: value.span().start, entries }
        };
        values.into_iter().flat_map(|values| values.iter()).map(table).collect()
    }

    /// Complains that a key is not there.
    pub(super) fn missing(&self, key: &'static str, hint: impl Into<Option<String>>) -> Error {
        let problem = Problem::MissingKey { key, section: in_section(&self.header), hint: hint.into() };
        self.source.error(self.at, problem)
    }

    fn get(&self, key: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.entries?.get(key)
    }

    fn entry<T>(&self, key: &str, at: &Spanned<DeValue<'_>>, value: T) -> Entry<'a, T> {
        Entry {
            value,
            source: self.source,
            key: key.to_owned(),
            header: self.header.clone(),
            at: at.span().start,
        }
    }

    fn parsed<T>(&self, key: &str, parse: fn(&str) -> Result<T, UnitError>) -> Result<Option<Entry<'a, T>>> {
        let Some(entry) = self.text(key) else { return Ok(None) };
        match parse(&entry.value) {
            Ok(value) => Ok(Some(entry.map(value))),
            Err(error) => Err(entry.bad(error.to_string(), error.hint())),
        }
    }
}

impl<'a, T> Entry<'a, T> {
    pub(super) fn place(&self) -> Place {
        self.source.place(self.at)
    }

    /// Complains about the meaning of the value.
    pub(super) fn bad(&self, reason: impl Into<String>, hint: impl Into<Option<String>>) -> Error {
        self.error(Problem::BadValue {
            key: self.key.clone(),
            section: in_section(&self.header),
            reason: reason.into(),
            hint: hint.into(),
        })
    }

    /// Complains that the value names nothing in the file.
    pub(super) fn unknown(&self, what: &'static str, name: &str, nearest: Option<String>) -> Error {
        self.error(Problem::UnknownName {
            key: self.key.clone(),
            section: in_section(&self.header),
            what,
            name: name.to_owned(),
            nearest,
        })
    }

    /// Returns the place, the key and the section in words, for a complaint that comes later.
    pub(super) fn into_parts(self) -> (Place, String, String) {
        (self.place(), self.key, in_section(&self.header))
    }

    /// Replaces the value by what it means.
    pub(super) fn map<U>(self, value: U) -> Entry<'a, U> {
        Entry { value, source: self.source, key: self.key, header: self.header, at: self.at }
    }

    fn error(&self, problem: Problem) -> Error {
        self.source.error(self.at, problem)
    }
}
