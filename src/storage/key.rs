//! The name of an object, relative to the root of its store.
//!
//! A key is one or more components separated by `/`. What may stand in one is chosen so that every key is,
//! byte for byte, a legal path of every store: a file name on any file system, an S3 key that needs no
//! escaping, an argument no shell splits. No component begins with a dot: hidden names belong to the stores
//! themselves (`local` stages its unfinished files under one), and `.` and `..` fall with them.
//!
//! Deliberately absent: what a key means. Only `repo/layout.rs` knows that.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The longest key, in bytes; S3 takes 1024 including the prefix of the location.
pub const KEY_BYTES_MAX: usize = 512;

/// The longest component of a key, in bytes: NAME_MAX of the file systems Linux knows.
pub const COMPONENT_BYTES_MAX: usize = 255;

/// Names one object of a store; ordered by its bytes, as every listing is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectKey(Arc<str>);

/// Says why a text is not an object key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No character at all.
    #[error("object key is empty")]
    Empty,
    /// Longer than [`KEY_BYTES_MAX`].
    #[error("object key of {bytes} bytes is longer than {KEY_BYTES_MAX}")]
    TooLong {
        /// The length found.
        bytes: usize,
    },
    /// Two slashes in a row, or one at either end.
    #[error("object key \"{}\" has an empty component", .key.escape_debug())]
    EmptyComponent {
        /// The text found.
        key: String,
    },
    /// A component longer than [`COMPONENT_BYTES_MAX`].
    #[error("object key \"{}\" has a component longer than {COMPONENT_BYTES_MAX} bytes", .key.escape_debug())]
    ComponentTooLong {
        /// The text found.
        key: String,
    },
    /// A component that begins with a dot, `.` and `..` among them.
    #[error("object key \"{}\" has a component that begins with a dot", .key.escape_debug())]
    Hidden {
        /// The text found.
        key: String,
    },
    /// A character outside letters, digits and `-_.=+@`.
    #[error("object key \"{}\" has the character {character:?}", .key.escape_debug())]
    Character {
        /// The text found.
        key: String,
        /// The first character that may not stand there.
        character: char,
    },
}

impl ObjectKey {
    /// Checks a text and makes it a key.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        if text.is_empty() {
            return Err(KeyError::Empty);
        }
        if text.len() > KEY_BYTES_MAX {
            return Err(KeyError::TooLong { bytes: text.len() });
        }
        for component in text.split('/') {
            check_component(text, component)?;
        }
        Ok(Self(text.into()))
    }

    /// Appends `tail`, itself one or more components, below this key.
    pub fn join(&self, tail: &str) -> Result<Self, KeyError> {
        Self::parse(&format!("{}/{tail}", self.0))
    }

    /// Returns the key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the last component.
    pub fn name(&self) -> &str {
        self.0.rsplit_once('/').map_or(&*self.0, |(_, name)| name)
    }
}

fn check_component(key: &str, component: &str) -> Result<(), KeyError> {
    if component.is_empty() {
        return Err(KeyError::EmptyComponent { key: key.to_owned() });
    }
    if component.len() > COMPONENT_BYTES_MAX {
        return Err(KeyError::ComponentTooLong { key: key.to_owned() });
    }
    if component.starts_with('.') {
        return Err(KeyError::Hidden { key: key.to_owned() });
    }
    match component.chars().find(|&character| !is_allowed(character)) {
        Some(character) => Err(KeyError::Character { key: key.to_owned(), character }),
        None => Ok(()),
    }
}

fn is_allowed(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '-' | '_' | '.' | '=' | '+' | '@')
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl AsRef<str> for ObjectKey {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

// Sound because the derived order and hash are those of the text.
impl Borrow<str> for ObjectKey {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl FromStr for ObjectKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::parse(text)
    }
}

impl TryFrom<String> for ObjectKey {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, KeyError> {
        Self::parse(&text)
    }
}

impl From<ObjectKey> for String {
    fn from(key: ObjectKey) -> Self {
        key.0.as_ref().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn takes_the_names_the_repository_uses() {
        for text in [
            "main/site.json",
            "main/basebackups/20261120T101500Z-3fa9/packs/17-0badcafe",
            "main/clusters/7012345678901234567-16/wal/00000001/0000000A/000000010000000A000000FF.partial.deadbeef",
            "a",
        ] {
            assert_eq!(ObjectKey::parse(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn refuses_what_some_store_could_misread() {
        let wrong = |text: &str| ObjectKey::parse(text).unwrap_err();
        assert_eq!(wrong(""), KeyError::Empty);
        for text in ["/a", "a/", "a//b", "/"] {
            assert!(matches!(wrong(text), KeyError::EmptyComponent { .. }), "{text}");
        }
        for text in [".", "..", "a/../b", "a/./b", ".hidden", "a/.hidden"] {
            assert!(matches!(wrong(text), KeyError::Hidden { .. }), "{text}");
        }
        for text in ["a b", "a\\b", "a\0", "ä", "a\n", "a%2f", "a:b", "a*"] {
            assert!(matches!(wrong(text), KeyError::Character { .. }), "{text:?}");
        }
        assert!(matches!(wrong(&"a".repeat(256)), KeyError::ComponentTooLong { .. }));
        assert!(matches!(wrong(&"a/".repeat(300)), KeyError::TooLong { bytes: 600 }));
        assert_eq!(wrong("a\nb").to_string(), r#"object key "a\nb" has the character '\n'"#);
    }

    #[test]
    fn joins_below_and_names_the_last_component() {
        let site = ObjectKey::parse("main").unwrap();
        let begin = site.join("basebackups/x/begin").unwrap();
        assert_eq!(begin.as_str(), "main/basebackups/x/begin");
        assert_eq!(begin.name(), "begin");
        assert_eq!(site.name(), "main");
        assert!(site.join("").is_err());
        assert!(site.join("../other").is_err());
    }

    #[test]
    fn deserialising_checks() {
        let key: ObjectKey = serde_json::from_str("\"main/site.json\"").unwrap();
        assert_eq!(serde_json::to_string(&key).unwrap(), "\"main/site.json\"");
        assert!(serde_json::from_str::<ObjectKey>("\"../etc/passwd\"").is_err());
    }

    proptest! {
        #[test]
        fn an_accepted_key_stays_below_its_root(text in "[a-z./\\-]{0,24}") {
            if let Ok(key) = ObjectKey::parse(&text) {
                let path = std::path::Path::new(key.as_str());
                let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
                prop_assert!(plain && path.components().count() == key.as_str().split('/').count());
            }
        }
    }
}
