//! Which clones a command means: one by its name, several by a pattern, and what came of several.
//!
//! A pattern has `*` for any letters and `?` for one, which no name has. What is done to several is done to each,
//! also after one has failed; then the command tells what was done, fails, and names those where it was not. One that is
//! named is told as ever.

use crate::control::CloneStatus;
use crate::instance::clone_folder::CloneFolder;

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::exit::ExitKind;
use super::existing;
use super::status::{ListReport, StatusReport};

/// The clones that a command means.
#[derive(Debug)]
pub(super) struct Chosen {
    /// At least one, by name.
    pub folders: Vec<CloneFolder>,
    /// Whether several were asked for, be it that there is one.
    pub are_several: bool,
}

/// What came of doing something to each of them.
#[derive(Debug)]
struct Outcomes<T> {
    done: Vec<T>,
    failures: Vec<(String, CommandError)>,
}

impl Chosen {
    /// Finds the clone of a name, or those that a pattern matches.
    ///
    /// # Errors
    /// A name or a pattern that no clone has.
    pub(super) fn find(context: &Context, pattern: &str) -> Result<Self, CommandError> {
        if !is_pattern(pattern) {
            return Ok(Self { folders: vec![existing(context, pattern)?], are_several: false });
        }
        let clones = &context.config()?.paths.clones;
        let mut folders = CloneFolder::list(clones)?;
        folders.retain(|folder| matches(pattern, folder.name()));
        if folders.is_empty() {
            let message = format!("no clone in \"{}\" matches \"{pattern}\"", clones.display());
            return Err(CommandError::failed(message).hint("\"walden clone list\" shows the clones."));
        }
        Ok(Self { folders, are_several: true })
    }

    /// Returns every clone of this host, which may be none.
    pub(super) fn all(context: &Context) -> Result<Self, CommandError> {
        Ok(Self { folders: CloneFolder::list(&context.config()?.paths.clones)?, are_several: true })
    }

    /// Does something to each, has `tell` print what was done, where anything was, and fails where anything was not;
    /// `undone` says what was not done there, such as "stopped".
    pub(super) fn each<T>(
        &self,
        undone: &str,
        work: impl Fn(&CloneFolder) -> Result<T, CommandError>,
        tell: impl FnOnce(Vec<T>) -> Result<(), CommandError>,
    ) -> Result<(), CommandError> {
        let mut outcomes = Outcomes { done: Vec::new(), failures: Vec::new() };
        for folder in &self.folders {
            match work(folder) {
                Ok(done) => outcomes.done.push(done),
                Err(error) => outcomes.failures.push((folder.name().to_owned(), error)),
            }
        }
        let error = if self.are_several { outcomes.of_several(undone) } else { outcomes.of_one() };
        if error.is_none() || !outcomes.done.is_empty() {
            tell(outcomes.done)?;
        }
        error.map_or(Ok(()), Err)
    }

    /// Prints how they are: one by itself, several as a list.
    pub(super) fn print(&self, context: &Context, clones: Vec<CloneStatus>) -> Result<(), CommandError> {
        match (self.are_several, clones.first()) {
            (false, Some(status)) => context.output.print(&StatusReport(status.clone())),
            _ => context.output.print(&ListReport { clones }),
        }
    }
}

impl<T> Outcomes<T> {
    fn of_one(&mut self) -> Option<CommandError> {
        self.failures.pop().map(|(_, error)| error)
    }

    fn of_several(&self, undone: &str) -> Option<CommandError> {
        let (failed, count) = (self.failures.len(), self.failures.len() + self.done.len());
        let (_, first) = self.failures.first()?;
        let (kind, hint): (ExitKind, Option<String>) = (first.kind, first.hint.clone());
        let told = self.failures.iter().map(|(name, error)| format!("{name}: {}", error.message()));
        let told: Vec<String> = told.collect();
        let message = format!("{failed} of {count} clones could not be {undone}: {}", told.join("; "));
        let error = CommandError::new(kind, message);
        Some(match hint {
            Some(hint) => error.hint(hint),
            None => error,
        })
    }
}

/// Tells whether something is a pattern and no name.
fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?'])
}

/// Tells whether a name is one that the pattern means.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    // Which lengths of the name the part of the pattern so far can stand for; names have forty letters at most.
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    for wanted in pattern {
        let mut next = vec![false; name.len() + 1];
        if *wanted == b'*' {
            let first = reached.iter().position(|reached| *reached).unwrap_or(reached.len());
            next[first..].fill(true);
        } else {
            for (at, letter) in name.iter().enumerate() {
                next[at + 1] = reached[at] && (*wanted == b'?' || wanted == letter);
            }
        }
        reached = next;
    }
    reached[name.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_means_the_names_it_spells() {
        for (pattern, name) in [
            ("*", "a"),
            ("a*", "a"),
            ("a*", "abc"),
            ("*c", "abc"),
            ("a?c", "abc"),
            ("a**c", "ac"),
            ("*b*", "abc"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in
            [("a*", "ba"), ("?", "ab"), ("a?c", "ac"), ("*b", "abc"), ("", "a"), ("A*", "a")]
        {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
        assert!(is_pattern("a*") && is_pattern("a?") && !is_pattern("a-b_c"));
    }

    #[test]
    fn what_failed_of_several_is_named_and_what_did_not_is_done() {
        let folder = |name: &str| CloneFolder::new(std::path::Path::new("/clones"), name).unwrap();
        let work = |folder: &CloneFolder| match folder.name() {
            "b" => Err(CommandError::failed("the disk is full").hint("Make room.")),
            name => Ok(name.to_owned()),
        };
        let each = |names: &[&str], are_several| {
            let folders = names.iter().map(|name| folder(name)).collect();
            let (chosen, mut told) = (Chosen { folders, are_several }, None);
            let outcome = chosen.each("stopped", work, |done| {
                told = Some(done);
                Ok(())
            });
            (told, outcome.map_err(|error| (error.message(), error.hint)))
        };
        let told = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(each(&["a", "c"], true), (told(&["a", "c"]), Ok(())));
        assert_eq!(each(&[], true), (told(&[]), Ok(())));
        let hint = Some("Make room.".to_owned());
        let failed = |message: &str| Err((message.to_owned(), hint.clone()));
        let of_three = failed("1 of 3 clones could not be stopped: b: the disk is full");
        assert_eq!(each(&["a", "b", "c"], true), (told(&["a", "c"]), of_three));
        let of_one = failed("1 of 1 clones could not be stopped: b: the disk is full");
        assert_eq!(each(&["b"], true), (None, of_one));
        assert_eq!(each(&["b"], false), (None, failed("the disk is full")));
    }
}
