//! From connection options to a target, by libpq's rules of precedence, without touching the network.
//!
//! What the connection string leaves open is taken from the service, then from the PG* variables, then from libpq's
//! defaults. Two defaults are Walden's own: a connect timeout, and keepalives that notice a dead peer within a minute,
//! because a backup host must never hang for ever on a server that is gone (failure 39).

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::conninfo::{self, Keywords, invalid};
use super::password_file::{self, Login};
use super::service_file;
use crate::replication::{ConnectOptions, Error};

/// Where Debian, Red Hat and PostgreSQL itself put the socket; the first is what `libpq` of the packages uses.
const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];
/// Where the system's service file is without PGSYSCONFDIR.
const SERVICE_DIRECTORIES: [&str; 2] = ["/etc/postgresql-common", "/etc/sysconfig/pgsql"];
const PORT_DEFAULT: u16 = 5432;
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
/// libpq takes one second for two, so that a timeout is never shorter than a tick.
const CONNECT_TIMEOUT_MIN: Duration = Duration::from_secs(2);

/// PG* variables and the keywords they stand for.
const VARIABLES: [(&str, &str); 20] = [
    ("PGAPPNAME", "application_name"),
    ("PGCHANNELBINDING", "channel_binding"),
    ("PGCONNECT_TIMEOUT", "connect_timeout"),
    ("PGDATABASE", "dbname"),
    ("PGGSSENCMODE", "gssencmode"),
    ("PGHOST", "host"),
    ("PGHOSTADDR", "hostaddr"),
    ("PGOPTIONS", "options"),
    ("PGPASSFILE", "passfile"),
    ("PGPASSWORD", "password"),
    ("PGPORT", "port"),
    ("PGREQUIREAUTH", "require_auth"),
    ("PGSSLCERT", "sslcert"),
    ("PGSSLCRL", "sslcrl"),
    ("PGSSLKEY", "sslkey"),
    ("PGSSLMODE", "sslmode"),
    ("PGSSLNEGOTIATION", "sslnegotiation"),
    ("PGSSLROOTCERT", "sslrootcert"),
    ("PGTARGETSESSIONATTRS", "target_session_attrs"),
    ("PGUSER", "user"),
];

/// Everything needed to open a session.
pub(super) struct Target {
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) user: String,
    pub(super) dbname: String,
    pub(super) options: String,
    pub(super) application_name: String,
    pub(super) attributes: SessionAttributes,
    pub(super) connect_timeout: Option<Duration>,
    pub(super) keepalive: Keepalive,
    pub(super) tls: TlsSettings,
    pub(super) channel_binding: ChannelBinding,
}

/// One of the servers to try, with the password meant for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) address: Address,
    pub(super) password: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Address {
    /// The path of the socket itself.
    Socket(PathBuf),
    /// `at` spares the look-up; `host` is still what a certificate must name.
    Tcp { host: String, at: Option<IpAddr>, port: u16 },
}

/// How a dead peer is noticed while nothing is sent, and while something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Keepalive {
    pub(super) enabled: bool,
    pub(super) idle: Duration,
    pub(super) interval: Duration,
    pub(super) count: u32,
    pub(super) user_timeout: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TlsSettings {
    pub(super) mode: SslMode,
    pub(super) direct: bool,
    pub(super) roots: Roots,
    /// Certificate chain and private key, both PEM.
    pub(super) client: Option<(PathBuf, PathBuf)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Roots {
    None,
    System,
    File(PathBuf),
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $keyword:literal, { $($variant:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum $name { $($variant),* }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),* })
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self, Error> {
                match text {
                    $($word => Ok(Self::$variant),)*
                    other => Err(invalid(format!("{} cannot be \"{other}\"", $keyword))),
                }
            }
        }
    };
}

words!(
    /// How much security the caller insists on.
    SslMode, "sslmode", {
        Disable = "disable", Allow = "allow", Prefer = "prefer",
        Require = "require", VerifyCa = "verify-ca", VerifyFull = "verify-full",
    }
);
words!(
    /// Whether the password exchange must be tied to the TLS connection.
    ChannelBinding, "channel_binding", { Disable = "disable", Prefer = "prefer", Require = "require" }
);
words!(
    /// Which of several servers is wanted.
    SessionAttributes, "target_session_attrs", {
        Any = "any", ReadWrite = "read-write", ReadOnly = "read-only",
        Primary = "primary", Standby = "standby", PreferStandby = "prefer-standby",
    }
);

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "socket \"{}\"", path.display()),
            Self::Tcp { host, at, port } if host.is_empty() => match at {
                Some(at) => write!(f, "{at} port {port}"),
                None => write!(f, "port {port}"),
            },
            Self::Tcp { host, port, .. } => write!(f, "{host} port {port}"),
        }
    }
}

/// Decides what to connect to.
pub(super) fn resolve(options: &ConnectOptions) -> Result<Target, Error> {
    let keywords = gather(options)?;
    let given = |keyword: &str| keywords.get(keyword).map(String::as_str).filter(|value| !value.is_empty());
    let user = match given("user") {
        Some(user) => user.to_owned(),
        None => system_user(options.connect_as)?,
    };
    let dbname = given("dbname").unwrap_or(&user).to_owned();
    let password_file = match (given("passfile"), &options.passfile) {
        (Some(path), _) => Some(PathBuf::from(path)),
        (None, Some(path)) => Some(path.clone()),
        (None, None) => options.env.get("HOME").map(|home| Path::new(home).join(".pgpass")),
    };
    let mut endpoints = Vec::new();
    for address in addresses(&keywords)? {
        let password = given("password").map(str::to_owned).or_else(|| {
            let (host, port) = address.login_host();
            let login = Login { host: &host, port, dbname: &dbname, user: &user };
            password_file.as_deref().and_then(|path| password_file::look_up(path, login))
        });
        endpoints.push(Endpoint { address, password });
    }
    Ok(Target {
        endpoints,
        options: given("options").unwrap_or_default().to_owned(),
        application_name: given("application_name")
            .or_else(|| given("fallback_application_name"))
            .unwrap_or("walden")
            .to_owned(),
        attributes: given("target_session_attrs").unwrap_or("any").parse()?,
        connect_timeout: connect_timeout(given("connect_timeout"))?,
        keepalive: keepalive(&keywords)?,
        tls: tls_settings(&keywords, options.env.get("HOME").map(String::as_str))?,
        channel_binding: given("channel_binding").unwrap_or("prefer").parse()?,
        user,
        dbname,
    })
}

/// Merges connection string, service and variables, the first to name a keyword winning.
fn gather(options: &ConnectOptions) -> Result<Keywords, Error> {
    let mut keywords = conninfo::parse(&options.conninfo)?;
    let service = keywords.get("service").or_else(|| options.env.get("PGSERVICE")).cloned();
    if let Some(service) = service.filter(|service| !service.is_empty()) {
        let found = read_service(options, keywords.get("servicefile"), &service)?;
        for (keyword, value) in found {
            keywords.entry(keyword).or_insert(value);
        }
    }
    for (variable, keyword) in VARIABLES {
        let Some(value) = options.env.get(variable).filter(|value| !value.is_empty()) else { continue };
        if !keywords.contains_key(keyword) {
            conninfo::insert(&mut keywords, keyword, value.clone())?;
        }
    }
    Ok(keywords)
}

fn read_service(options: &ConnectOptions, given: Option<&String>, service: &str) -> Result<Keywords, Error> {
    let mut paths: Vec<PathBuf> = Vec::new();
    match given.or_else(|| options.env.get("PGSERVICEFILE")) {
        Some(path) => paths.push(path.into()),
        None => paths.extend(options.env.get("HOME").map(|home| Path::new(home).join(".pg_service.conf"))),
    }
    match options.env.get("PGSYSCONFDIR") {
        Some(directory) => paths.push(Path::new(directory).join("pg_service.conf")),
        None => paths.extend(SERVICE_DIRECTORIES.map(|d| Path::new(d).join("pg_service.conf"))),
    }
    for path in paths {
        let mut text = String::new();
        let read =
            File::open(&path).and_then(|file| file.take(service_file::LENGTH_MAX).read_to_string(&mut text));
        match read {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::File { path, detail: error.to_string() }),
        }
        if let Some(found) = service_file::find(&text, service)? {
            return Ok(found);
        }
    }
    Err(invalid(format!("service \"{service}\" is in no service file")))
}

fn addresses(keywords: &Keywords) -> Result<Vec<Address>, Error> {
    let list = |keyword: &str| -> Vec<&str> {
        keywords
            .get(keyword)
            .filter(|value| !value.is_empty())
            .map(|v| v.split(',').collect())
            .unwrap_or_default()
    };
    let (hosts, at, ports) = (list("host"), list("hostaddr"), list("port"));
    let count = hosts.len().max(at.len()).max(1);
    if !hosts.is_empty() && !at.is_empty() && hosts.len() != at.len() {
        return Err(invalid(format!("{} hosts but {} hostaddrs", hosts.len(), at.len())));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(invalid(format!("{count} hosts but {} ports", ports.len())));
    }
    (0..count)
        .map(|i| {
            let port = ports.get(i).or(ports.first()).copied().unwrap_or_default();
            let port = match port {
                "" => PORT_DEFAULT,
                text => text
                    .trim()
                    .parse()
                    .ok()
                    .filter(|port| *port > 0)
                    .ok_or_else(|| invalid(format!("port \"{text}\" is no port number")))?,
            };
            address(hosts.get(i).copied().unwrap_or_default(), at.get(i).copied().unwrap_or_default(), port)
        })
        .collect()
}

fn address(host: &str, at: &str, port: u16) -> Result<Address, Error> {
    if !at.is_empty() {
        let at = at.parse().map_err(|_| invalid(format!("hostaddr \"{at}\" is no address")))?;
        return Ok(Address::Tcp { host: host.to_owned(), at: Some(at), port });
    }
    if host.starts_with('@') {
        return Err(invalid("sockets in the abstract namespace are not supported".into()));
    }
    if host.starts_with('/') {
        return Ok(Address::Socket(socket_path(Path::new(host), port)));
    }
    if !host.is_empty() {
        return Ok(Address::Tcp { host: host.to_owned(), at: None, port });
    }
    let mut candidates =
        SOCKET_DIRECTORIES.map(|directory| socket_path(Path::new(directory), port)).into_iter();
    let first = candidates.next().expect("there is a first socket directory");
    if first.exists() {
        return Ok(Address::Socket(first));
    }
    Ok(Address::Socket(candidates.find(|path| path.exists()).unwrap_or(first)))
}

/// Returns the path of the socket a server with this directory and port listens on.
pub(super) fn socket_path(directory: &Path, port: u16) -> PathBuf {
    directory.join(format!(".s.PGSQL.{port}"))
}

impl Address {
    /// Returns host and port as a password file names them: the packages' own socket directory is `localhost`.
    fn login_host(&self) -> (String, u16) {
        match self {
            Self::Tcp { host, at, port } => match at {
                Some(at) if host.is_empty() => (at.to_string(), *port),
                _ => (host.clone(), *port),
            },
            Self::Socket(path) => {
                let directory = path.parent().map(|d| d.to_string_lossy().into_owned()).unwrap_or_default();
                let port = path.extension().and_then(|port| port.to_str()).and_then(|port| port.parse().ok());
                let packaged = SOCKET_DIRECTORIES.contains(&directory.as_str());
                (if packaged { "localhost".into() } else { directory }, port.unwrap_or(PORT_DEFAULT))
            }
        }
    }
}

fn system_user(uid: Option<u32>) -> Result<String, Error> {
    let uid = uid.map_or_else(nix::unistd::geteuid, nix::unistd::Uid::from_raw);
    match nix::unistd::User::from_uid(uid) {
        Ok(Some(user)) => Ok(user.name),
        _ => Err(invalid(format!("user is not given and user id {uid} has no name"))),
    }
}

fn number<T: FromStr>(keywords: &Keywords, keyword: &str) -> Result<Option<T>, Error> {
    let Some(text) = keywords.get(keyword).filter(|text| !text.is_empty()) else { return Ok(None) };
    let refuse = |_| invalid(format!("{keyword} cannot be \"{text}\""));
    text.trim().parse().map(Some).map_err(refuse)
}

fn connect_timeout(text: Option<&str>) -> Result<Option<Duration>, Error> {
    let Some(text) = text else { return Ok(Some(CONNECT_TIMEOUT_DEFAULT)) };
    let seconds: i64 =
        text.trim().parse().map_err(|_| invalid(format!("connect_timeout cannot be \"{text}\"")))?;
    match u64::try_from(seconds) {
        Ok(0) | Err(_) => Ok(None),
        Ok(seconds) => Ok(Some(Duration::from_secs(seconds).max(CONNECT_TIMEOUT_MIN))),
    }
}

fn keepalive(keywords: &Keywords) -> Result<Keepalive, Error> {
    let seconds = |keyword: &str, default: u64| -> Result<Duration, Error> {
        let given = number::<u32>(keywords, keyword)?.filter(|seconds| *seconds > 0);
        Ok(Duration::from_secs(given.map_or(default, u64::from)))
    };
    Ok(Keepalive {
        enabled: number::<i64>(keywords, "keepalives")? != Some(0),
        idle: seconds("keepalives_idle", 30)?,
        interval: seconds("keepalives_interval", 10)?,
        count: number::<u32>(keywords, "keepalives_count")?.filter(|count| *count > 0).unwrap_or(3),
        user_timeout: number::<u32>(keywords, "tcp_user_timeout")?
            .filter(|milliseconds| *milliseconds > 0)
            .map_or(Duration::from_secs(60), |milliseconds| Duration::from_millis(milliseconds.into())),
    })
}

fn tls_settings(keywords: &Keywords, home: Option<&str>) -> Result<TlsSettings, Error> {
    let given = |keyword: &str| keywords.get(keyword).map(String::as_str).filter(|value| !value.is_empty());
    let in_home =
        |name: &str| home.map(|home| Path::new(home).join(".postgresql").join(name)).filter(|p| p.exists());
    let roots = match given("sslrootcert") {
        Some("system") => Roots::System,
        Some(path) => Roots::File(path.into()),
        None => in_home("root.crt").map_or(Roots::None, Roots::File),
    };
    let mode = match given("sslmode") {
        Some(word) => word.parse()?,
        None if roots == Roots::System => SslMode::VerifyFull,
        None => SslMode::Prefer,
    };
    if roots == Roots::System && mode != SslMode::VerifyFull {
        return Err(invalid(format!("sslrootcert=system needs sslmode=verify-full, not {mode}")));
    }
    if roots == Roots::None && matches!(mode, SslMode::VerifyCa | SslMode::VerifyFull) {
        return Err(invalid(format!("sslmode={mode} needs sslrootcert, or ~/.postgresql/root.crt")));
    }
    let certificate = given("sslcert").map(PathBuf::from).or_else(|| in_home("postgresql.crt"));
    let key = given("sslkey").map(PathBuf::from).or_else(|| in_home("postgresql.key"));
    let direct = match given("sslnegotiation").unwrap_or("postgres") {
        "postgres" => false,
        "direct" => true,
        other => return Err(invalid(format!("sslnegotiation cannot be \"{other}\""))),
    };
    Ok(TlsSettings { mode, direct, roots, client: certificate.zip(key) })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn options(conninfo: &str, env: &[(&str, &str)]) -> ConnectOptions {
        let env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        ConnectOptions { env, ..ConnectOptions::new(conninfo) }
    }

    fn resolve_ok(conninfo: &str, env: &[(&str, &str)]) -> Target {
        resolve(&options(conninfo, env)).unwrap_or_else(|error| panic!("{conninfo}: {error}"))
    }

    fn refusal(conninfo: &str) -> String {
        match resolve(&options(conninfo, &[])) {
            Ok(_) => panic!("{conninfo} was accepted"),
            Err(error) => error.to_string(),
        }
    }

    fn addresses_of(conninfo: &str) -> Vec<String> {
        resolve_ok(conninfo, &[]).endpoints.iter().map(|e| e.address.to_string()).collect()
    }

    #[test]
    fn string_beats_service_beats_variable_beats_default() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("services");
        fs::write(&file, "[main]\nport=2\nuser=service\ndbname=service\n").unwrap();
        let env = [
            ("PGSERVICEFILE", file.to_str().unwrap()),
            ("PGUSER", "variable"),
            ("PGAPPNAME", "variable"),
            ("PGDATABASE", "variable"),
        ];
        let target = resolve_ok("service=main host=h user=string", &env);
        assert_eq!(target.user, "string");
        assert_eq!(target.dbname, "service");
        assert_eq!(target.application_name, "variable");
        assert_eq!(target.endpoints[0].address.to_string(), "h port 2");
        assert_eq!(target.connect_timeout, Some(CONNECT_TIMEOUT_DEFAULT));
        let unknown = resolve(&options("service=none", &env)).err().unwrap();
        assert!(unknown.to_string().contains("service \"none\" is in no service file"));
    }

    #[test]
    fn hosts_ports_and_socket_directories_are_paired() {
        assert_eq!(addresses_of("host=a,b port=1,2"), ["a port 1", "b port 2"]);
        assert_eq!(addresses_of("host=a,b port=7"), ["a port 7", "b port 7"]);
        assert_eq!(addresses_of("host=/x/y port=5433"), ["socket \"/x/y/.s.PGSQL.5433\""]);
        assert_eq!(addresses_of("hostaddr=::1"), ["::1 port 5432"]);
        assert_eq!(addresses_of("host=a,"), ["a port 5432", "socket \"/var/run/postgresql/.s.PGSQL.5432\""]);
        assert!(refusal("host=a,b,c port=1,2").contains("3 hosts but 2 ports"));
        assert!(refusal("host=a port=0").contains("port \"0\""));
        assert!(refusal("host=a port=70000").contains("port \"70000\""));
        assert!(refusal("host=a hostaddr=b").contains("hostaddr \"b\""));
    }

    #[test]
    fn a_password_is_looked_up_for_each_host() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("pgpass");
        fs::write(&file, "b:*:*:*:for b\nlocalhost:*:*:*:for the socket\n").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        let mut options = options("host=a,b,/var/run/postgresql user=u", &[]);
        options.passfile = Some(file);
        let passwords: Vec<_> =
            resolve(&options).ok().unwrap().endpoints.into_iter().map(|e| e.password).collect();
        assert_eq!(passwords, [None, Some("for b".into()), Some("for the socket".into())]);
        let env = [("PGPASSWORD", "variable")];
        assert_eq!(resolve_ok("host=a user=u", &env).endpoints[0].password.as_deref(), Some("variable"));
    }

    #[test]
    fn tls_promises_that_cannot_be_kept_are_refused() {
        assert_eq!(resolve_ok("host=a user=u", &[]).tls.mode, SslMode::Prefer);
        assert_eq!(resolve_ok("host=a user=u sslrootcert=system", &[]).tls.mode, SslMode::VerifyFull);
        assert!(refusal("host=a user=u sslmode=verify-ca").contains("needs sslrootcert"));
        assert!(refusal("host=a user=u sslmode=require sslrootcert=system").contains("verify-full"));
        assert!(refusal("host=a user=u sslmode=on").contains("sslmode cannot be \"on\""));
    }

    #[test]
    fn timeouts_follow_libpq() {
        let timeout =
            |text: &str| resolve_ok(&format!("host=a user=u connect_timeout={text}"), &[]).connect_timeout;
        assert_eq!(timeout("0"), None);
        assert_eq!(timeout("-1"), None);
        assert_eq!(timeout("1"), Some(CONNECT_TIMEOUT_MIN));
        assert_eq!(timeout("7"), Some(Duration::from_secs(7)));
        assert!(!resolve_ok("host=a user=u keepalives=0", &[]).keepalive.enabled);
        assert!(refusal("host=a user=u keepalives_idle=soon").contains("keepalives_idle"));
    }
}
