//! libpq's connection strings, both forms, turned into keywords and values.
//!
//! `host=/run/postgresql user='a b'` and `postgres://user:secret@host:5433/db?sslmode=require` mean here what the libpq
//! documentation says (34.1.1). What libpq knows and Walden need not honour is accepted and dropped; what would be a
//! broken promise if dropped (`sslcrl`, `require_auth`, …) is refused.

use std::collections::BTreeMap;

use crate::replication::Error;

/// Keywords and their values; a keyword given twice keeps its last value.
pub(super) type Keywords = BTreeMap<String, String>;

/// Keywords that have a meaning here.
const HONOURED: [&str; 26] = [
    "application_name",
    "channel_binding",
    "connect_timeout",
    "dbname",
    "fallback_application_name",
    "host",
    "hostaddr",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "options",
    "passfile",
    "password",
    "port",
    "service",
    "servicefile",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslnegotiation",
    "sslrootcert",
    "target_session_attrs",
    "tcp_user_timeout",
    "user",
    "gssencmode",
];

/// Keywords without which a connection is as safe and as good.
const DROPPED: [&str; 13] = [
    "client_encoding",
    "gssdelegation",
    "gsslib",
    "krbsrvname",
    "load_balance_hosts",
    "max_protocol_version",
    "min_protocol_version",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslcertmode",
    "sslcompression",
    "sslkeylogfile",
    "sslsni",
];

/// Keywords libpq knows and Walden cannot keep.
const REFUSED: [&str; 8] = [
    "oauth_client_id",
    "oauth_issuer",
    "replication",
    "require_auth",
    "requirepeer",
    "sslcrl",
    "sslcrldir",
    "sslpassword",
];

/// Parses a connection string of either form.
pub(super) fn parse(text: &str) -> Result<Keywords, Error> {
    let pairs = match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
        Some(rest) => parse_url(rest)?,
        None => parse_pairs(text)?,
    };
    let mut keywords = Keywords::new();
    for (keyword, value) in pairs {
        insert(&mut keywords, &keyword, value)?;
    }
    Ok(keywords)
}

/// Adds one keyword, refusing what is unknown or cannot be kept.
pub(super) fn insert(keywords: &mut Keywords, keyword: &str, value: String) -> Result<(), Error> {
    if HONOURED.contains(&keyword) {
        if keyword == "gssencmode" && value == "require" {
            return Err(invalid("gssencmode=require is not supported".into()));
        }
        keywords.insert(keyword.to_owned(), value);
        return Ok(());
    }
    if DROPPED.contains(&keyword) {
        tracing::debug!(keyword, "connection keyword has no effect here");
        return Ok(());
    }
    let why = if REFUSED.contains(&keyword) { "is not supported" } else { "is unknown" };
    Err(invalid(format!("keyword \"{keyword}\" {why}")))
}

pub(super) fn invalid(detail: String) -> Error {
    Error::Settings { detail }
}

fn parse_pairs(text: &str) -> Result<Vec<(String, String)>, Error> {
    let mut pairs = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let end = rest.find(|c: char| c == '=' || c.is_whitespace()).unwrap_or(rest.len());
        let keyword = &rest[..end];
        let Some(value) = rest[end..].trim_start().strip_prefix('=') else {
            return Err(invalid(format!("\"=\" is missing after \"{keyword}\"")));
        };
        let (value, after) = parse_value(keyword, value.trim_start())?;
        pairs.push((keyword.to_owned(), value));
        rest = after.trim_start();
    }
    Ok(pairs)
}

/// Takes one value, quoted or bare, in which a backslash makes the next character an ordinary one.
fn parse_value<'a>(keyword: &str, text: &'a str) -> Result<(String, &'a str), Error> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut characters = text.char_indices().skip(usize::from(quoted));
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => value.extend(characters.next().map(|(_, c)| c)),
            '\'' if quoted => return Ok((value, &text[at + 1..])),
            c if c.is_whitespace() && !quoted => return Ok((value, &text[at..])),
            c => value.push(c),
        }
    }
    if quoted {
        return Err(invalid(format!("the quoted value of \"{keyword}\" does not end")));
    }
    Ok((value, ""))
}

/// Parses what follows the scheme: `[user[:password]@][host[:port],…][/dbname][?keyword=value&…]`.
///
/// Written out because URL parsers refuse what libpq allows: several hosts, and a socket directory as `%2Frun`.
fn parse_url(text: &str) -> Result<Vec<(String, String)>, Error> {
    let mut pairs = Vec::new();
    let (text, query) = text.split_once('?').unwrap_or((text, ""));
    let (authority, dbname) = text.split_once('/').unwrap_or((text, ""));
    let hosts = match authority.rsplit_once('@') {
        Some((login, hosts)) => {
            let (user, password) = login.split_once(':').unwrap_or((login, ""));
            push_decoded(&mut pairs, "user", user)?;
            push_decoded(&mut pairs, "password", password)?;
            hosts
        }
        None => authority,
    };
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',') {
        let (name, port) = split_port(host)?;
        names.push(decode(name)?);
        ports.push(port.to_owned());
    }
    if names.iter().any(|name| !name.is_empty()) {
        pairs.push(("host".into(), names.join(",")));
    }
    if ports.iter().any(|port| !port.is_empty()) {
        pairs.push(("port".into(), ports.join(",")));
    }
    push_decoded(&mut pairs, "dbname", dbname)?;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (keyword, value) = pair
            .split_once('=')
            .ok_or_else(|| invalid(format!("\"=\" is missing after \"{pair}\" in the URL")))?;
        match (decode(keyword)?.as_str(), decode(value)?) {
            ("ssl", value) if value == "true" => pairs.push(("sslmode".into(), "require".into())),
            (keyword, value) => pairs.push((keyword.to_owned(), value)),
        }
    }
    Ok(pairs)
}

/// Splits `host:port`, where the host may be an IPv6 address in brackets.
fn split_port(host: &str) -> Result<(&str, &str), Error> {
    if let Some(rest) = host.strip_prefix('[') {
        let (address, after) = rest
            .split_once(']')
            .ok_or_else(|| invalid(format!("\"]\" is missing in the host \"{host}\" of the URL")))?;
        return Ok((address, after.strip_prefix(':').unwrap_or("")));
    }
    Ok(host.split_once(':').unwrap_or((host, "")))
}

fn push_decoded(pairs: &mut Vec<(String, String)>, keyword: &str, value: &str) -> Result<(), Error> {
    if !value.is_empty() {
        pairs.push((keyword.to_owned(), decode(value)?));
    }
    Ok(())
}

/// Resolves `%xx`; the result must be UTF-8 without a zero byte.
fn decode(text: &str) -> Result<String, Error> {
    let malformed = || invalid("a percent escape in the URL is malformed".into());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digits = rest.get(..2).ok_or_else(malformed)?;
        let mut byte = [0];
        hex::decode_to_slice(digits, &mut byte).map_err(|_| malformed())?;
        bytes.extend(byte);
        rest = &rest[2..];
    }
    let text = String::from_utf8(bytes).map_err(|_| malformed())?;
    if text.contains('\0') { Err(malformed()) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keywords(pairs: &[(&str, &str)]) -> Keywords {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn pairs_are_read_as_libpq_reads_them() {
        let parsed =
            parse(r" host = /run/postgresql  user='it\'s me' password=a\ b dbname='' port=5433 ").unwrap();
        let expected = [
            ("host", "/run/postgresql"),
            ("user", "it's me"),
            ("password", "a b"),
            ("dbname", ""),
            ("port", "5433"),
        ];
        assert_eq!(parsed, keywords(&expected));
        assert_eq!(parse("").unwrap(), keywords(&[]));
        assert_eq!(parse("port=1 port=2").unwrap(), keywords(&[("port", "2")]));
    }

    #[test]
    fn urls_are_read_as_libpq_reads_them() {
        let parsed =
            parse("postgres://me:s%40cret@db1:5433,[::1]/my%20db?sslmode=verify-full&application_name=x");
        let expected = [
            ("user", "me"),
            ("password", "s@cret"),
            ("host", "db1,::1"),
            ("port", "5433,"),
            ("dbname", "my db"),
            ("sslmode", "verify-full"),
            ("application_name", "x"),
        ];
        assert_eq!(parsed.unwrap(), keywords(&expected));
        let parsed = parse("postgresql:///db?host=/run/postgresql&ssl=true").unwrap();
        let expected = [("dbname", "db"), ("host", "/run/postgresql"), ("sslmode", "require")];
        assert_eq!(parsed, keywords(&expected));
        assert_eq!(parse("postgres://%2Frun%2Fpg").unwrap(), keywords(&[("host", "/run/pg")]));
    }

    #[test]
    fn what_cannot_be_meant_or_kept_is_refused_by_name() {
        let message = |text: &str| parse(text).unwrap_err().to_string();
        assert!(message("hots=x").contains("\"hots\" is unknown"));
        assert!(message("sslcrl=/x").contains("\"sslcrl\" is not supported"));
        assert!(message("host").contains("\"=\" is missing after \"host\""));
        assert!(message("password='abc").contains("does not end"));
        assert!(!message("password='abc").contains("abc"), "a secret is not repeated");
        assert!(message("postgres://[::1").contains("\"]\" is missing"));
        assert!(message("postgres://a%2").contains("percent escape"));
        assert!(message("postgres://a%00b/").contains("percent escape"));
        assert!(message("gssencmode=require").contains("gssencmode"));
    }

    proptest! {
        #[test]
        fn any_value_survives_quoting(value in "\\PC*") {
            let quoted = value.replace('\\', r"\\").replace('\'', r"\'");
            let parsed = parse(&format!("host=a password='{quoted}' user=b")).unwrap();
            prop_assert_eq!(&parsed["password"], &value);
            prop_assert_eq!(&parsed["user"], "b");
        }

        #[test]
        fn nothing_makes_the_parser_panic(text in "\\PC*", scheme in prop::bool::ANY) {
            let text = if scheme { format!("postgres://{text}") } else { text };
            let _ = parse(&text);
        }
    }
}
