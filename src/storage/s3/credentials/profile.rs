//! A profile of the files that AWS's tools share, `~/.aws/credentials` and `~/.aws/config`.
//!
//! Sections in brackets, `name` in the first file and `profile name` in the second (but `default` in both), with lines of
//! `key = value`; indented lines belong to the key above and hold nothing for us. The files are read each time.

use std::collections::BTreeMap;
use std::path::Path;

use super::document::{Credentials, read_file};
use super::error::SourceError;
use super::fetch::Asker;
use super::{Profile, WebIdentity};

/// Settings by which a profile gets its credentials in ways that are not followed.
const NOT_FOLLOWED: [&str; 6] = [
    "source_profile",
    "credential_source",
    "credential_process",
    "sso_session",
    "sso_start_url",
    "login_session",
];

/// What a session is called where nobody says.
const SESSION_NAME: &str = "walden";

type Section = BTreeMap<String, String>;

/// What a profile says.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Keys(Credentials),
    Role(WebIdentity),
}

impl Profile {
    /// Reads the profile, and takes on the role that it names.
    pub(super) async fn fetch(&self, asker: &Asker) -> Result<Credentials, SourceError> {
        let credentials = self.read(&self.credentials_file)?;
        let config = self.read(&self.config_file)?;
        match self.choose(credentials.as_deref(), config.as_deref())? {
            Said::Keys(credentials) => Ok(credentials),
            Said::Role(role) => role.fetch(asker).await,
        }
    }

    /// Reads a file. Under another user's `HOME`, as daemons are started, the files that nobody named are his.
    fn read(&self, path: &Path) -> Result<Option<String>, SourceError> {
        read_file(path).map_err(|error| match error {
            SourceError::Refused(why) => self.lacking(why),
            other => other,
        })
    }

    fn choose(&self, credentials: Option<&str>, config: Option<&str>) -> Result<Said, SourceError> {
        let titled = match self.name.as_str() {
            "default" => vec!["default".to_owned(), "profile default".to_owned()],
            name => vec![format!("profile {name}")],
        };
        let files = [(credentials, vec![self.name.clone()]), (config, titled)];
        let found: Vec<Section> =
            files.into_iter().filter_map(|(text, titles)| section(text?, &titles)).collect();
        let files =
            || format!("\"{}\" and \"{}\"", self.credentials_file.display(), self.config_file.display());
        if found.is_empty() {
            return Err(self.lacking(format!("it is not in {}", files())));
        }
        if let Some(keys) = found.iter().find(|section| section.contains_key("aws_access_key_id")) {
            let Some(secret) = keys.get("aws_secret_access_key") else {
                return Err(SourceError::Refused(
                    "it has aws_access_key_id and no aws_secret_access_key".into(),
                ));
            };
            let token = keys.get("aws_session_token").map(String::as_str);
            return Credentials::new(&keys["aws_access_key_id"], secret, token, None).map(Said::Keys);
        }
        let get = |key: &str| found.iter().find_map(|section| section.get(key));
        if let (Some(token_file), Some(role_arn)) = (get("web_identity_token_file"), get("role_arn")) {
            return Ok(Said::Role(WebIdentity {
                token_file: token_file.into(),
                role_arn: role_arn.clone(),
                session_name: get("role_session_name").cloned().unwrap_or_else(|| SESSION_NAME.to_owned()),
                sts_endpoint: self.sts_endpoint.clone(),
            }));
        }
        if let Some(key) = NOT_FOLLOWED.into_iter().find(|key| get(key).is_some()) {
            return Err(SourceError::Refused(format!("it has {key}, which walden does not follow")));
        }
        Err(self.lacking(format!("it has no aws_access_key_id in {}", files())))
    }

    /// A profile that was asked for has to be there.
    fn lacking(&self, why: String) -> SourceError {
        if self.is_named { SourceError::Refused(why) } else { SourceError::Absent(why) }
    }
}

/// Returns the keys of the sections with one of these titles, the later ones over the earlier.
fn section(text: &str, titles: &[String]) -> Option<Section> {
    let mut found: Option<Section> = None;
    let mut is_ours = false;
    for line in text.lines() {
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with(['#', ';']) {
            continue;
        }
        if let Some(title) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            let title = title.split_whitespace().collect::<Vec<_>>().join(" ");
            is_ours = titles.contains(&title);
            if is_ours {
                found.get_or_insert_default();
            }
        } else if is_ours
            && !line.starts_with([' ', '\t'])
            && let Some((key, value)) = line.split_once('=')
        {
            // As AWS's tools do: a comment begins after a space.
            let value = value.split(" #").next().unwrap_or_default();
            let value = value.split(" ;").next().unwrap_or_default().trim();
            found.get_or_insert_default().insert(key.trim().to_ascii_lowercase(), value.to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(name: &str, is_named: bool) -> Profile {
        Profile {
            name: name.to_owned(),
            is_named,
            credentials_file: "/home/x/.aws/credentials".into(),
            config_file: "/home/x/.aws/config".into(),
            sts_endpoint: "https://sts.example.org".to_owned(),
        }
    }

    const CREDENTIALS: &str = "\
# of the day
[default]
aws_access_key_id = AKIDEFAULT
aws_secret_access_key=se/cr+et==
; another
[ prod ]
AWS_ACCESS_KEY_ID = AKIPROD  # since May
aws_secret_access_key = prod-secret
aws_session_token = prod-token
[half]
aws_access_key_id = AKIHALF
";

    const CONFIG: &str = "\
[default]
region = eu-central-1
[profile prod]
aws_access_key_id = not-this-one
[profile role]
web_identity_token_file = /run/token
role_arn = arn:aws:iam::1:role/walden
[profile sso]
sso_session = company
s3 =
  aws_access_key_id = nested
[profile empty]
";

    fn chosen(name: &str, is_named: bool) -> Result<Said, SourceError> {
        profile(name, is_named).choose(Some(CREDENTIALS), Some(CONFIG))
    }

    fn keys(id: &str, secret: &str, token: Option<&str>) -> Said {
        Said::Keys(Credentials::new(id, secret, token, None).unwrap())
    }

    #[test]
    fn keys_are_read_from_the_first_file_that_has_them() {
        assert_eq!(chosen("default", false).unwrap(), keys("AKIDEFAULT", "se/cr+et==", None));
        assert_eq!(chosen("prod", true).unwrap(), keys("AKIPROD", "prod-secret", Some("prod-token")));
        let only_config = profile("prod", true)
            .choose(None, Some("[profile prod]\naws_access_key_id=a\naws_secret_access_key=b"));
        assert_eq!(only_config.unwrap(), keys("a", "b", None));
    }

    #[test]
    fn a_profile_may_name_a_role_and_a_token() {
        let Said::Role(role) = chosen("role", true).unwrap() else { panic!("no role") };
        assert_eq!(role.token_file, std::path::Path::new("/run/token"));
        assert_eq!(
            (role.role_arn.as_str(), role.session_name.as_str()),
            ("arn:aws:iam::1:role/walden", "walden")
        );
        assert_eq!(role.sts_endpoint, "https://sts.example.org");
    }

    #[test]
    fn what_is_not_followed_is_refused_by_name_and_never_passed_over() {
        for named in [true, false] {
            let refused = SourceError::Refused("it has sso_session, which walden does not follow".to_owned());
            assert_eq!(chosen("sso", named).unwrap_err(), refused);
            assert!(
                matches!(chosen("half", named), Err(SourceError::Refused(why)) if why.contains("no aws_secret"))
            );
        }
    }

    #[test]
    fn only_a_profile_that_nobody_named_may_be_absent() {
        for name in ["other", "empty"] {
            assert!(matches!(chosen(name, true), Err(SourceError::Refused(_))), "{name}");
            assert!(matches!(chosen(name, false), Err(SourceError::Absent(_))), "{name}");
        }
        let nowhere = profile("default", false).choose(None, None).unwrap_err();
        assert!(matches!(nowhere, SourceError::Absent(why) if why.contains("/home/x/.aws/credentials")));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_an_error_where_somebody_asked_for_it() {
        // A folder cannot be read by anybody, root included.
        let folder = tempfile::tempdir().unwrap();
        let read = |is_named| profile("default", is_named).read(folder.path()).unwrap_err();
        assert!(matches!(read(true), SourceError::Refused(why) if why.contains("could not read")));
        assert!(matches!(read(false), SourceError::Absent(why) if why.contains("could not read")));
    }

    #[test]
    fn a_token_that_cannot_be_sent_is_refused_without_repeating_it() {
        let text =
            "[default]\naws_access_key_id = id\naws_secret_access_key = x\naws_session_token = hun ter2\n";
        let error = profile("default", false).choose(Some(text), None).unwrap_err();
        assert!(matches!(&error, SourceError::Refused(why) if why.contains("visible ASCII")), "{error:?}");
        assert!(!format!("{error:?}").contains("ter2"));
    }
}
