//! Which of the source's preloaded libraries a clone loads: a list of the harmless ones, and what is there.
//!
//! A library missing on this host stops the start (failure 27c), and one that runs workers of its own may reach out of
//! the clone: a job scheduler runs its jobs again, a distributed database calls its nodes. So a library is loaded only
//! if it is known to stay inside, or if the user names it because the WAL holds records of its resource manager, and
//! only if its file is there. What was left out is told with the reason.

use std::path::Path;

/// Libraries that observe or guide statements and do nothing by themselves.
const HARMLESS: [&str; 10] = [
    "auto_explain",
    "auth_delay",
    "hypopg",
    "passwordcheck",
    "pg_hint_plan",
    "pg_qualstats",
    "pg_stat_kcache",
    "pg_stat_statements",
    "pg_wait_sampling",
    "pgaudit",
];
/// More libraries than this are not looked at; nobody preloads so many.
const LIBRARIES_MAX: usize = 100;

/// What becomes of the source's `shared_preload_libraries`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Preload {
    /// To be loaded, in the source's order.
    pub loaded: Vec<String>,
    /// Left out, each with the reason.
    pub left_out: Vec<(String, &'static str)>,
}

impl Preload {
    /// Returns the value of `shared_preload_libraries`.
    pub fn setting(&self) -> String {
        let quoted: Vec<String> =
            self.loaded.iter().map(|name| format!("\"{}\"", name.replace('"', "\"\""))).collect();
        quoted.join(", ")
    }
}

/// Decides which libraries of the source's setting a clone loads.
///
/// `needed` are names the user vouches for; `is_present` tells whether a library's file is on this host.
pub fn plan_preload(setting: &str, needed: &[String], is_present: impl Fn(&str) -> bool) -> Preload {
    let mut plan = Preload::default();
    for name in names(setting).into_iter().chain(needed.iter().cloned()) {
        let known = HARMLESS.contains(&name.as_str()) || needed.contains(&name);
        if plan.loaded.contains(&name) || plan.left_out.iter().any(|(left_out, _)| *left_out == name) {
            continue;
        }
        if !known {
            plan.left_out.push((name, "it is not known to stay inside the clone"));
        } else if !is_present(&name) {
            plan.left_out.push((name, "its library is not on this host"));
        } else {
            plan.loaded.push(name);
        }
    }
    plan
}

/// Tells whether a library is in a server's library directory, under the name `shared_preload_libraries` gives.
pub fn is_in(library_directory: &Path, name: &str) -> bool {
    let plain = !name.is_empty() && !name.contains('/');
    plain && ["", ".so"].iter().any(|end| library_directory.join(format!("{name}{end}")).is_file())
}

/// Splits the setting as the server does: commas between names, quotes around names, `$libdir/` in front of some.
fn names(setting: &str) -> Vec<String> {
    let mut names = vec![String::new()];
    let mut quoted = false;
    let mut characters = setting.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                names.last_mut().expect("there is always a name begun").push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => names.push(String::new()),
            other => names.last_mut().expect("there is always a name begun").push(other),
        }
    }
    let plain =
        names.iter().map(|name| name.trim()).map(|name| name.strip_prefix("$libdir/").unwrap_or(name));
    plain
        .map(|name| name.strip_suffix(".so").unwrap_or(name))
        .filter(|name| !name.is_empty())
        .take(LIBRARIES_MAX)
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn loaded(setting: &str) -> Vec<String> {
        plan_preload(setting, &[], |_| true).loaded
    }

    #[test]
    fn harmless_libraries_that_are_there_are_loaded_once_in_their_order() {
        let setting = r#" pg_stat_statements , "auto_explain","$libdir/pgaudit.so",pg_stat_statements,"#;
        let plan = plan_preload(setting, &[], |name| name != "pgaudit");
        assert_eq!(plan.loaded, ["pg_stat_statements", "auto_explain"]);
        assert_eq!(plan.left_out, [("pgaudit".to_owned(), "its library is not on this host")]);
        assert_eq!(plan.setting(), r#""pg_stat_statements", "auto_explain""#);
    }

    #[test]
    fn failure_27c_what_reaches_out_is_left_out_unless_it_is_vouched_for() {
        let plan = plan_preload("pg_cron, citus,/opt/own.so", &[], |_| true);
        assert!(plan.loaded.is_empty());
        assert_eq!(plan.left_out.len(), 3);
        let plan = plan_preload("pg_cron,citus", &["citus".into()], |_| true);
        assert_eq!(plan.loaded, ["citus"]);
        // The source may have been given it since the basebackup.
        assert_eq!(plan_preload("pg_cron", &["citus".into()], |_| true).loaded, ["citus"]);
        assert_eq!(plan_preload("", &["citus".into()], |_| false).left_out.len(), 1);
    }

    #[test]
    fn nothing_to_load_is_an_empty_setting() {
        assert_eq!(plan_preload("", &[], |_| true).setting(), "");
        assert_eq!(loaded(" , ,"), Vec::<String>::new());
    }

    #[test]
    fn a_library_is_looked_for_in_its_directory_alone() {
        let scratch = tempfile::tempdir().unwrap();
        std::fs::write(scratch.path().join("pgaudit.so"), "").unwrap();
        assert!(is_in(scratch.path(), "pgaudit") && is_in(scratch.path(), "pgaudit.so"));
        assert!(
            !is_in(scratch.path(), "none")
                && !is_in(scratch.path(), "../pgaudit")
                && !is_in(scratch.path(), "")
        );
    }

    proptest! {
        #[test]
        fn only_known_names_are_ever_loaded(setting in "\\PC{0,80}") {
            for name in loaded(&setting) {
                prop_assert!(HARMLESS.contains(&name.as_str()));
            }
        }
    }
}
