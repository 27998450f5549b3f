//! A role for a token that somebody else vouches for: Kubernetes, a CI service, an identity provider.
//!
//! One unsigned request to the security token service; the token proves who asks. The session it gives lasts as long as
//! the role says, an hour where it does not.

use reqwest::Method;
use url::form_urlencoded::Serializer;

use super::WebIdentity;
use super::document::{Credentials, from_xml, read_token};
use super::error::SourceError;
use super::fetch::Asker;

/// The version of the service's interface.
const VERSION: &str = "2011-06-15";

impl WebIdentity {
    /// Takes the role on.
    pub(super) async fn fetch(&self, asker: &Asker) -> Result<Credentials, SourceError> {
        let token = read_token(&self.token_file)?;
        // In the body: what stands in a URL ends up in logs.
        let form = Serializer::new(String::new())
            .append_pair("Action", "AssumeRoleWithWebIdentity")
            .append_pair("Version", VERSION)
            .append_pair("RoleArn", &self.role_arn)
            .append_pair("RoleSessionName", &self.session_name)
            .append_pair("WebIdentityToken", &token)
            .finish();
        let question = asker
            .far(Method::POST, &self.sts_endpoint)
            .header("content-type", "application/x-www-form-urlencoded")
            .header("accept", "text/xml")
            .body(form);
        let placed = |why: String| format!("{}: {why}", self.sts_endpoint);
        let answered = question.ask().await.and_then(|body| from_xml(&body));
        answered.map_err(|error| match error {
            // A service that knows no such path is not the service.
            SourceError::Absent(why) | SourceError::Refused(why) => SourceError::Refused(placed(why)),
            SourceError::Unreachable(why) => SourceError::Unreachable(placed(why)),
        })
    }
}
