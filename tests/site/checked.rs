//! What `walden check` said, and configurations that differ in one place.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use crate::support::{Run, Scratch, Walden};

/// The items of one check by name.
pub struct Checked {
    pub items: BTreeMap<String, Value>,
    pub run: Run,
}

impl Checked {
    /// Runs `walden check`, whatever it finds.
    #[track_caller]
    pub fn by(walden: &Walden, options: &[&str]) -> Self {
        let run = walden.try_run(&[&["--json", "check"], options].concat());
        let items: Vec<Value> =
            serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {run:?}"));
        let named = |item: Value| (item["name"].as_str().unwrap().to_owned(), item);
        let count = items.len();
        let items: BTreeMap<String, Value> = items.into_iter().map(named).collect();
        assert_eq!(items.len(), count, "two items have one name");
        Self { items, run }
    }

    /// The names of the items with a status.
    pub fn with(&self, status: &str) -> Vec<&str> {
        self.items
            .iter()
            .filter(|(_, item)| item["status"] == status)
            .map(|(name, _)| name.as_str())
            .collect()
    }

    /// Checks that these items failed and no others, each with a hint, and that the exit status says so.
    #[track_caller]
    pub fn assert_failed(&self, what: &str, names: &[&str]) {
        assert_eq!(self.with("failed"), names, "{what}: {}\n{}", self.run.stdout, self.run.stderr);
        for name in names {
            let item = &self.items[*name];
            assert!(item["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{what}: {item}");
        }
        assert_eq!(self.run.code(), Some(i32::from(!names.is_empty())), "{what}: {}", self.run.stderr);
    }

    #[track_caller]
    pub fn detail(&self, name: &str) -> &str {
        self.items[name]["detail"].as_str().unwrap()
    }

    #[track_caller]
    pub fn hint(&self, name: &str) -> &str {
        self.items[name]["hint"].as_str().unwrap()
    }
}

/// Puts `to` in the place of `from` in the configuration; nothing else changes.
#[track_caller]
pub fn edit(scratch: &Scratch, walden: &Walden, from: &str, to: &str) {
    let text = fs::read_to_string(walden.configuration_file()).unwrap();
    assert!(text.contains(from), "there is no {from} in\n{text}");
    scratch.file("walden/walden.toml", &text.replace(from, to));
}
