//! The role of a machine, from its metadata service, version 2: a session first, then the role's name, then its keys.
//!
//! Version 1 asks without a session, and whoever gets a machine to fetch a URL for him has its keys; it is not spoken.

use std::time::Duration;

use reqwest::Method;

use super::Instance;
use super::document::{Credentials, from_json};
use super::error::SourceError;
use super::fetch::Asker;

const TOKEN_PATH: &str = "/latest/api/token";
const ROLES_PATH: &str = "/latest/meta-data/iam/security-credentials/";
const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";
/// Each fetch begins a session, which need not outlive it.
const TOKEN_SECONDS: &str = "60";

/// How often the service is tried before nobody is taken to be there.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(200);

impl Instance {
    /// Asks for the keys of the machine's role.
    pub(super) async fn fetch(&self, asker: &Asker) -> Result<Credentials, SourceError> {
        let token = self.session(asker).await?;
        let get = |path: String| {
            asker.near(Method::GET, &format!("{}{path}", self.endpoint)).header(TOKEN_HEADER, &token).ask()
        };
        let roles = get(ROLES_PATH.to_owned()).await.map_err(|error| match error {
            SourceError::Absent(_) => SourceError::Absent("the machine has no role".to_owned()),
            other => other,
        })?;
        let roles = String::from_utf8_lossy(&roles).into_owned();
        let role = roles.lines().next().map(str::trim).unwrap_or_default();
        if role.is_empty() || !role.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(SourceError::Absent("the machine has no role".to_owned()));
        }
        from_json(&get(format!("{ROLES_PATH}{role}")).await?)
    }

    /// Begins a session; where nobody answers, this is no machine with a role.
    async fn session(&self, asker: &Asker) -> Result<String, SourceError> {
        let mut attempt = 1;
        loop {
            let question = asker
                .near(Method::PUT, &format!("{}{TOKEN_PATH}", self.endpoint))
                .header("x-aws-ec2-metadata-token-ttl-seconds", TOKEN_SECONDS)
                .header("content-length", "0");
            match question.ask().await {
                Ok(token) => {
                    let token = String::from_utf8_lossy(&token).trim().to_owned();
                    let is_one = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
                    let none = || SourceError::Refused("its answer is no session token".to_owned());
                    return if is_one { Ok(token) } else { Err(none()) };
                }
                Err(SourceError::Unreachable(_)) if attempt < ATTEMPTS => attempt += 1,
                Err(SourceError::Unreachable(why)) => return Err(SourceError::Absent(why)),
                Err(error) => return Err(error),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}
