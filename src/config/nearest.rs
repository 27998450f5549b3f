//! The nearest known word to a misspelled one.
//!
//! Damerau-Levenshtein, because exchanged letters are the usual slip. A word that differs in more than a third
//! of its letters is no suggestion: a wrong hint costs more than none.

/// Returns the known word that was probably meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |candidate: &str| strsim::damerau_levenshtein(&word.to_lowercase(), candidate);
    let (least, candidate) = known.into_iter().map(|candidate| (distance(candidate), candidate)).min()?;
    let longest = word.chars().count().max(candidate.chars().count());
    (least * 3 <= longest.max(3)).then_some(candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognized_and_strangers_are_not() {
        let known = ["retention", "recipients", "wal_recipients", "url", "state"];
        for (word, meant) in [
            ("retension", Some("retention")),
            ("Recipients", Some("recipients")),
            ("wal-recipients", Some("wal_recipients")),
            ("ulr", Some("url")),
            ("sate", Some("state")),
            ("colour", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, known), meant, "{word}");
        }
        assert_eq!(nearest("url", []), None);
    }
}
