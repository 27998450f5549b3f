//! The default credential chain of S3, as the environment sets it up.
//!
//! The order is that of AWS's own tools: variables, the profile of the shared files, a web identity, the agent of a
//! container, the role of the machine. What is not set up is passed over with the variable that would do it, for the
//! message of a chain in which nobody had any. Nothing is read or asked here.

use std::path::PathBuf;

use url::Url;

use crate::storage::{
    Authorization, Container, CredentialChain, CredentialSource, Instance, Profile, Secret, Step, WebIdentity,
};

use super::environment::Environment;
use super::error::{Error, Result};

/// The agent of a container where its address has no host (ECS).
const CONTAINER_AGENT: &str = "http://169.254.170.2";

/// The metadata service of a machine, by IPv4 and by IPv6.
const METADATA: [&str; 2] = ["http://169.254.169.254", "http://[fd00:ec2::254]"];

/// What a session is called where nobody says.
const SESSION_NAME: &str = "walden";

/// Says what is asked for credentials for a store at an endpoint (AWS if absent), in a region.
pub(super) fn credential_chain(
    environment: &Environment,
    endpoint: Option<&str>,
    region: &str,
) -> Result<CredentialChain> {
    let sts = sts_endpoint(environment, region)?;
    Ok(CredentialChain(vec![
        skip("environment", "AWS_ACCESS_KEY_ID is not set"),
        profile(environment, &sts)?,
        web_identity(environment, sts)?,
        container(environment)?,
        instance(environment, endpoint)?,
    ]))
}

fn skip(source: &'static str, why: &str) -> Step {
    Step::Skip { source, why: why.to_owned() }
}

fn sts_endpoint(environment: &Environment, region: &str) -> Result<String> {
    let set = environment.text("AWS_ENDPOINT_URL_STS")?.or(environment.text("AWS_ENDPOINT_URL")?);
    let domain = if region.starts_with("cn-") { "amazonaws.com.cn" } else { "amazonaws.com" };
    Ok(set.unwrap_or_else(|| format!("https://sts.{region}.{domain}")))
}

fn profile(environment: &Environment, sts_endpoint: &str) -> Result<Step> {
    let named = environment.text("AWS_PROFILE")?.or(environment.text("AWS_DEFAULT_PROFILE")?);
    let folder = environment.home().map(|home| home.join(".aws"));
    let file = |variable: &str, name: &str| -> Option<PathBuf> {
        environment.path(variable).or_else(|| Some(folder.as_ref()?.join(name)))
    };
    let files = (file("AWS_SHARED_CREDENTIALS_FILE", "credentials"), file("AWS_CONFIG_FILE", "config"));
    let (credentials_file, config_file) = match files {
        (None, None) => return Ok(skip("profile", "neither AWS_SHARED_CREDENTIALS_FILE nor HOME is set")),
        (Some(credentials), Some(config)) => (credentials, config),
        (Some(only), None) | (None, Some(only)) => (only.clone(), only),
    };
    Ok(Step::Ask(CredentialSource::Profile(Profile {
        is_named: named.is_some() || environment.path("AWS_SHARED_CREDENTIALS_FILE").is_some(),
        name: named.unwrap_or_else(|| "default".to_owned()),
        credentials_file,
        config_file,
        sts_endpoint: sts_endpoint.to_owned(),
    })))
}

fn web_identity(environment: &Environment, sts_endpoint: String) -> Result<Step> {
    let Some(token_file) = environment.path("AWS_WEB_IDENTITY_TOKEN_FILE") else {
        return Ok(skip("web identity", "AWS_WEB_IDENTITY_TOKEN_FILE is not set"));
    };
    let Some(role_arn) = environment.text("AWS_ROLE_ARN")? else {
        let reason = "not set, and AWS_WEB_IDENTITY_TOKEN_FILE is".to_owned();
        return Err(Error::Environment { name: "AWS_ROLE_ARN".to_owned(), reason });
    };
    let session_name = environment.text("AWS_ROLE_SESSION_NAME")?.unwrap_or_else(|| SESSION_NAME.to_owned());
    let identity = WebIdentity { token_file, role_arn, session_name, sts_endpoint };
    Ok(Step::Ask(CredentialSource::WebIdentity(identity)))
}

fn container(environment: &Environment) -> Result<Step> {
    let relative = environment.text("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")?;
    let url = match relative.map(|path| format!("{CONTAINER_AGENT}{path}")) {
        None => environment.text("AWS_CONTAINER_CREDENTIALS_FULL_URI")?,
        relative => relative,
    };
    let Some(url) = url else {
        let why = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI and AWS_CONTAINER_CREDENTIALS_FULL_URI are not set";
        return Ok(skip("container agent", why));
    };
    let token = environment.text("AWS_CONTAINER_AUTHORIZATION_TOKEN")?;
    let authorization = match (environment.path("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"), token) {
        (Some(file), _) => Authorization::TokenFile(file),
        (None, Some(token)) => Authorization::Token(Secret::from(token)),
        (None, None) => Authorization::None,
    };
    Ok(Step::Ask(CredentialSource::Container(Container { url, authorization })))
}

/// The role of a machine of AWS is for stores of AWS, unless somebody says where a metadata service is.
fn instance(environment: &Environment, endpoint: Option<&str>) -> Result<Step> {
    const NAME: &str = "instance metadata";
    let disabled = environment.text("AWS_EC2_METADATA_DISABLED")?;
    if disabled.is_some_and(|text| text.eq_ignore_ascii_case("true")) {
        return Ok(skip(NAME, "AWS_EC2_METADATA_DISABLED is true"));
    }
    let [v4, v6] = METADATA;
    let by_mode = environment.text("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE")?;
    let is_v6 = by_mode.is_some_and(|mode| mode.eq_ignore_ascii_case("ipv6"));
    let endpoint = match environment.text("AWS_EC2_METADATA_SERVICE_ENDPOINT")? {
        Some(set) => set.trim_end_matches('/').to_owned(),
        None if !endpoint.is_none_or(is_aws) => return Ok(skip(NAME, "the store is not AWS's")),
        None => if is_v6 { v6 } else { v4 }.to_owned(),
    };
    Ok(Step::Ask(CredentialSource::Instance(Instance { endpoint })))
}

fn is_aws(endpoint: &str) -> bool {
    let url = Url::parse(endpoint).ok();
    let host = url.as_ref().and_then(Url::host_str).unwrap_or_default();
    [".amazonaws.com", ".amazonaws.com.cn"].iter().any(|domain| host.ends_with(domain))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(variables: &[(&str, &str)], endpoint: Option<&str>) -> Vec<Step> {
        credential_chain(&Environment::of(1000, variables), endpoint, "eu-central-1").unwrap().0
    }

    fn asked(variables: &[(&str, &str)], endpoint: Option<&str>) -> Vec<CredentialSource> {
        let ask = |step| match step {
            Step::Ask(source) => Some(source),
            Step::Skip { .. } => None,
        };
        chain(variables, endpoint).into_iter().filter_map(ask).collect()
    }

    const STORE: Option<&str> = Some("https://s3.example.org");

    #[test]
    fn what_is_not_set_up_is_passed_over_with_what_would_set_it_up() {
        let skipped = chain(&[], STORE).into_iter().map(|step| match step {
            Step::Skip { source, why } => format!("{source}: {why}"),
            Step::Ask(source) => panic!("{source:?}"),
        });
        let said: Vec<String> = skipped.collect();
        let sources = ["environment", "profile", "web identity", "container agent", "instance metadata"];
        assert!(said.iter().zip(sources).all(|(said, source)| said.starts_with(source)), "{said:?}");
        assert!(said[2].contains("AWS_WEB_IDENTITY_TOKEN_FILE"), "{said:?}");
        assert!(said[4].contains("not AWS's"), "{said:?}");
    }

    #[test]
    fn a_profile_is_named_or_the_default_one_of_the_home_directory() {
        let CredentialSource::Profile(profile) = asked(&[("HOME", "/home/x")], STORE).remove(0) else {
            panic!()
        };
        assert_eq!((profile.name.as_str(), profile.is_named), ("default", false));
        assert_eq!(profile.credentials_file, PathBuf::from("/home/x/.aws/credentials"));
        assert_eq!(profile.config_file, PathBuf::from("/home/x/.aws/config"));
        assert_eq!(profile.sts_endpoint, "https://sts.eu-central-1.amazonaws.com");

        let variables = [
            ("AWS_PROFILE", "prod"),
            ("AWS_SHARED_CREDENTIALS_FILE", "/etc/walden/aws"),
            ("HOME", "/home/x"),
            ("AWS_ENDPOINT_URL_STS", "https://sts.example.org"),
        ];
        let CredentialSource::Profile(profile) = asked(&variables, STORE).remove(0) else { panic!() };
        assert_eq!((profile.name.as_str(), profile.is_named), ("prod", true));
        assert_eq!(profile.credentials_file, PathBuf::from("/etc/walden/aws"));
        assert_eq!(profile.sts_endpoint, "https://sts.example.org");
    }

    #[test]
    fn a_web_identity_takes_a_token_and_a_role() {
        let variables = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/run/token"), ("AWS_ROLE_ARN", "arn:x")];
        let wanted = WebIdentity {
            token_file: "/run/token".into(),
            role_arn: "arn:x".to_owned(),
            session_name: "walden".to_owned(),
            sts_endpoint: "https://sts.eu-central-1.amazonaws.com".to_owned(),
        };
        assert_eq!(asked(&variables, STORE), [CredentialSource::WebIdentity(wanted)]);
        let error = credential_chain(&Environment::of(0, &variables[..1]), None, "x").unwrap_err();
        assert!(error.to_string().contains("AWS_ROLE_ARN is not set"), "{error}");
        assert_eq!(
            sts_endpoint(&Environment::of(0, &[]), "cn-north-1").unwrap(),
            "https://sts.cn-north-1.amazonaws.com.cn"
        );
    }

    #[test]
    fn an_agent_has_a_path_or_an_address_and_a_token_or_a_file_of_it() {
        let container = |variables: &[(&str, &str)]| match asked(variables, STORE).remove(0) {
            CredentialSource::Container(container) => container,
            other => panic!("{other:?}"),
        };
        let relative = container(&[("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/credentials/x")]);
        assert_eq!(relative.url, "http://169.254.170.2/v2/credentials/x");
        assert_eq!(relative.authorization, Authorization::None);
        let mut variables = vec![
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.23/v1/credentials"),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "Bearer x"),
        ];
        let full = container(&variables);
        assert_eq!(full.url, "http://169.254.170.23/v1/credentials");
        assert_eq!(full.authorization, Authorization::Token(Secret::from("Bearer x".to_owned())));
        variables.push(("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/run/token"));
        assert_eq!(container(&variables).authorization, Authorization::TokenFile("/run/token".into()));
    }

    #[test]
    fn the_role_of_a_machine_is_for_stores_of_aws_unless_its_service_is_named() {
        let endpoint = |variables: &[(&str, &str)], store| match asked(variables, store).pop() {
            Some(CredentialSource::Instance(instance)) => Some(instance.endpoint),
            _ => None,
        };
        assert_eq!(endpoint(&[], None).as_deref(), Some("http://169.254.169.254"));
        let private = Some("https://bucket.vpce-1.s3.eu-central-1.vpce.amazonaws.com");
        assert_eq!(endpoint(&[], private).as_deref(), Some("http://169.254.169.254"));
        for other in ["https://s3.example.org", "https://amazonaws.com.example.org", "nonsense"] {
            assert_eq!(endpoint(&[], Some(other)), None, "{other}");
        }
        let named = [("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1/")];
        assert_eq!(endpoint(&named, STORE).as_deref(), Some("http://127.0.0.1:1"));
        let v6 = [("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv6")];
        assert_eq!(endpoint(&v6, None).as_deref(), Some("http://[fd00:ec2::254]"));
        assert_eq!(endpoint(&[("AWS_EC2_METADATA_DISABLED", "true")], None), None);
    }
}
