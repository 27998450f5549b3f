//! The agent of a container: one request to an address that the container was given.
//!
//! What it answers is all that a role may do, so http is for this host and for the known addresses of agents.

use std::net::IpAddr;

use reqwest::Method;
use url::{Host, Url};

use super::document::{Credentials, from_json, read_token};
use super::error::SourceError;
use super::fetch::Asker;
use super::{Authorization, Container};

/// Addresses of agents, beside loopback: ECS, EKS, and EKS by IPv6.
const AGENTS: [&str; 3] = ["169.254.170.2", "169.254.170.23", "fd00:ec2::23"];

impl Container {
    /// Asks the agent.
    pub(super) async fn fetch(&self, asker: &Asker) -> Result<Credentials, SourceError> {
        self.check_address()?;
        let token = match &self.authorization {
            Authorization::None => None,
            Authorization::Token(token) => Some(token.expose().to_owned()),
            Authorization::TokenFile(file) => Some(read_token(file)?),
        };
        let mut question = asker.near(Method::GET, &self.url).header("accept", "application/json");
        if let Some(token) = token {
            if !token.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
                let what = "its authorization token holds other than visible ASCII characters";
                return Err(SourceError::Refused(what.to_owned()));
            }
            question = question.header("authorization", &token);
        }
        let body = question.ask().await.map_err(|error| match error {
            // It was named, so its silence about us is a refusal.
            SourceError::Absent(why) => SourceError::Refused(why),
            other => other,
        })?;
        from_json(&body)
    }

    fn check_address(&self) -> Result<(), SourceError> {
        let refused = |why: &str| Err(SourceError::Refused(why.to_owned()));
        let Ok(url) = Url::parse(&self.url) else { return refused("its address is no URL") };
        let may_hear = |address: IpAddr| {
            address.is_loopback() || AGENTS.iter().any(|agent| agent.parse() == Ok(address))
        };
        let is_near = match url.host() {
            Some(Host::Ipv4(address)) => may_hear(address.into()),
            Some(Host::Ipv6(address)) => may_hear(address.into()),
            Some(Host::Domain(name)) => name == "localhost",
            None => false,
        };
        match url.scheme() {
            "https" => Ok(()),
            "http" if is_near => Ok(()),
            "http" => refused("http is for this host and for the known addresses of agents"),
            _ => refused("its address is neither https nor http"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_is_for_this_host_and_for_agents() {
        let check = |url: &str| {
            let container = Container { url: url.to_owned(), authorization: Authorization::None };
            container.check_address()
        };
        for url in [
            "http://169.254.170.2/v2/credentials/x",
            "http://169.254.170.23/v1/credentials",
            "http://[fd00:ec2::23]/v1/credentials",
            "http://127.0.0.1:80/",
            "http://localhost/",
            "https://agent.example.org/",
        ] {
            check(url).unwrap();
        }
        for url in ["http://agent.example.org/", "http://10.0.0.1/", "ftp://localhost/", "/v2"] {
            assert!(matches!(check(url), Err(SourceError::Refused(_))), "{url}");
        }
    }
}
