//! One line of `walden check`: what was looked at, how it is, and what to do about it.
//!
//! *Skipped* is an answer of its own: what could not be tried because something it stands on failed is neither right
//! nor wrong, and the reader mends the first thing first.

use std::error::Error;

use serde::Serialize;

/// What was found out about one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Item {
    /// What was looked at; the same in every run.
    pub name: String,
    /// How it is.
    pub status: Status,
    /// What was seen.
    pub detail: String,
    /// What to do, as a sentence.
    pub hint: Option<String>,
}

/// How something is, the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Not tried, because something it stands on failed.
    Skipped,
    /// It works, and something is lost by it.
    Warning,
    /// It does not work.
    Failed,
}

impl Status {
    /// Returns the word that is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Skipped => "skipped",
            Self::Warning => "warning",
            Self::Failed => "failed",
        }
    }
}

impl Item {
    /// Creates the item of something that is as it should be.
    pub fn ok(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), status: Status::Ok, detail: detail.into(), hint: None }
    }

    /// Creates the item of something that was not tried.
    pub fn skipped(name: impl Into<String>, why: impl Into<String>) -> Self {
        Self { status: Status::Skipped, ..Self::ok(name, why) }
    }

    /// Creates the item of something that works and could be better.
    pub fn warning(name: impl Into<String>, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { status: Status::Warning, hint: Some(hint.into()), ..Self::ok(name, detail) }
    }

    /// Creates the item of something that does not work.
    pub fn failed(name: impl Into<String>, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { status: Status::Failed, hint: Some(hint.into()), ..Self::ok(name, detail) }
    }

    /// Says of which server the item is, where there are several.
    #[must_use]
    pub fn of_node(self, node: Option<usize>) -> Self {
        match node {
            Some(number) => Self { name: format!("node {number}: {}", self.name), ..self },
            None => self,
        }
    }
}

/// Returns the message of an error with its causes, each said once.
pub fn describe(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Many errors quote their source already.
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = error.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_worse_than_a_warning_and_says_what_to_do() {
        assert!(Status::Ok < Status::Skipped && Status::Skipped < Status::Warning);
        assert!(Status::Warning < Status::Failed);
        let item = Item::failed("archive_mode", "off", "Set it.").of_node(Some(2));
        assert_eq!(
            serde_json::to_value(&item).unwrap(),
            serde_json::json!({
                "name": "node 2: archive_mode", "status": "failed", "detail": "off", "hint": "Set it."
            })
        );
        assert_eq!(Item::ok("a", "b").of_node(None).name, "a");
    }
}
