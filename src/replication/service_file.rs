//! `pg_service.conf`: connection settings under a name (libpq documentation, 34.17).
//!
//! The user's own file is searched first, then the system's; the first that has the service wins. An INI dialect:
//! sections in brackets, `keyword=value` lines, `#` comments, no quoting, no nested service.

use super::conninfo::{self, Keywords, invalid};
use crate::replication::Error;

/// No service file is longer; libpq bounds the line, we bound the file.
pub(super) const LENGTH_MAX: u64 = 1 << 20;

/// Returns the settings of `service` in the text of a service file, or `None` where it has no such section.
pub(super) fn find(text: &str, service: &str) -> Result<Option<Keywords>, Error> {
    let mut found = None;
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            if found.is_some() {
                break;
            }
            if name.0 == service {
                found = Some(Keywords::new());
            }
            continue;
        }
        let Some(keywords) = found.as_mut() else { continue };
        let (keyword, value) = line
            .split_once('=')
            .ok_or_else(|| invalid(format!("service \"{service}\" has a line without \"=\"")))?;
        let keyword = keyword.trim();
        if keyword.starts_with("service") {
            return Err(invalid(format!("service \"{service}\" names another service")));
        }
        conninfo::insert(keywords, keyword, value.trim().to_owned())?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: &str =
        "# ours\n[a]\nhost=one\n\n[main]\n host = /run/postgresql \nuser=walden\n# x\n[b]\nport=1\n";

    #[test]
    fn the_section_of_the_service_is_read_to_its_end() {
        let main = find(FILE, "main").unwrap().unwrap();
        assert_eq!(main["host"], "/run/postgresql");
        assert_eq!(main["user"], "walden");
        assert_eq!(main.len(), 2);
        assert_eq!(find(FILE, "none").unwrap(), None);
    }

    #[test]
    fn nonsense_in_the_section_is_refused_and_elsewhere_ignored() {
        let nested = find("[a]\nservice=b\n", "a").unwrap_err();
        assert!(nested.to_string().contains("names another service"));
        assert!(find("[a]\nnonsense\n", "a").unwrap_err().to_string().contains("without \"=\""));
        assert!(find("nonsense\n[b]\nhots=1\n[a]\n", "a").unwrap().unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(before in "(?s)[^\\[]{0,40}", text in "(?s).{0,60}") {
            let _ = find(&text, "main");
            let _ = find(&format!("{before}\n[main]\n{text}"), "main");
            let _ = find(&format!("[main]\nhost={text}\n]["), "main");
        }
    }
}
