//! Whole configurations, good and bad: every message with its file, line, key and hint.
//!
//! The messages are written out, because they are what an operator reads at night.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;

use crate::codec::{CodecId, Compression};
use crate::replication::ServerRole;
use crate::storage::Location;
use crate::wal::receive::Acknowledge;

use super::*;

fn parse(text: &str) -> Result<Config> {
    let environment = Environment::of(0, &[]);
    Config::parse(text, Path::new("/etc/walden/walden.toml"), &environment)
}

/// The configuration of the product's description, as far as this release has it.
const WHOLE: &str = r#"
[paths]
state = "state"
run = "/run/walden"

[storage]
url = "file:///var/lib/walden/repo"

[encryption]
recipients = ["2026-11"]
signer = "2026-11"
trusted_signers = ["2026-11", "old"]
[encryption.keys."2026-11"]
public_key_file = "2026-11.pub.pem"
private_key_file = "/secret/2026-11.pem"
signing_key_file = "2026-11.sign.pem"
verify_key_file = "2026-11.verify.pem"
[encryption.keys.old]
verify_key_file = "old.verify.pem"

[compression]
algorithm = "zstd"
level = 6

[limits]
threads = 2
memory = "128MiB"

[sites.main]
data_directory = "/var/lib/postgresql/15/main"
wal = "receive"
[[sites.main.nodes]]
connection = "host=/run/postgresql user=walden"
prefer = "primary"
[[sites.main.nodes]]
connection = "postgres://walden@db2"
prefer = "standby"
[sites.main.archive]
fetch_wait = "90s"
queue_max = "64GiB"
ack = "store"
slot = "backup"

[sites.other]
prefix = "elsewhere/other"
connection = "host=db3"
[sites.other.storage]
url = "s3://bucket/backups"
"#;

#[test]
fn a_whole_configuration_is_read() {
    let config = parse(WHOLE).unwrap();
    assert_eq!(config.paths.state, Path::new("/etc/walden/state"));
    assert_eq!(config.paths.clones, Path::new("/etc/walden/state/clones"));
    assert_eq!(config.compression.basebackup, Compression::zstd(6));
    assert_eq!(config.compression.wal, Compression::zstd(-1));
    assert_eq!((config.limits.threads, config.limits.memory_bytes), (2, 128 << 20));

    let encryption = config.encryption.as_ref().unwrap();
    assert_eq!(encryption.recipients, ["2026-11"]);
    assert_eq!(encryption.wal_recipients, encryption.recipients);
    assert_eq!(encryption.signer.as_deref(), Some("2026-11"));
    assert_eq!(encryption.trusted_signers, ["2026-11", "old"]);
    let files = &encryption.keys["2026-11"];
    assert_eq!(files.public.as_ref().unwrap().path, Path::new("/etc/walden/2026-11.pub.pem"));
    assert_eq!(files.private.as_ref().unwrap().path, Path::new("/secret/2026-11.pem"));

    let main = config.site(Some("main")).unwrap();
    assert_eq!(main.prefix.as_str(), "main");
    assert_eq!(main.storage.location, Location::File("/var/lib/walden/repo".into()));
    assert_eq!(main.nodes.len(), 2);
    assert_eq!(main.nodes[1].prefer, ServerRole::Standby);
    assert_eq!(main.fetch_wait, Duration::from_secs(90));
    assert_eq!(main.queue_max_bytes, Some(64 << 30));
    assert_eq!((main.wal, main.acknowledge), (WalSource::Receive, Acknowledge::Store));
    assert_eq!(main.slot, "backup");
    let other = config.site(Some("other")).unwrap();
    assert_eq!(other.storage.location.to_string(), "s3://bucket/backups");
    assert_eq!(other.prefix.as_str(), "elsewhere/other");
    assert_eq!(other.nodes[0].connection.expose(), "host=db3");
    assert_eq!(other.fetch_wait, Duration::from_secs(60));
    assert_eq!(other.queue_max_bytes, None);
    assert_eq!((other.wal, other.acknowledge), (WalSource::Push, Acknowledge::Spool));
    assert_eq!(other.slot, "walden_other");
}

#[test]
fn relative_paths_stay_where_they_are_when_the_working_directory_changes() {
    let text = "[paths]\nstate = \"state\"\nrun = \"../run\"\n";
    let here = std::env::current_dir().unwrap();
    let paths = Config::parse(text, Path::new("walden.toml"), &Environment::of(0, &[])).unwrap().paths;
    assert_eq!((paths.state, paths.run), (here.join("state"), here.join("../run")));
}

#[test]
fn little_is_needed() {
    let config = parse("[storage]\nurl = \"memory://\"\n[sites.main]\n").unwrap();
    assert_eq!(config.encryption, None);
    assert_eq!(config.compression, CompressionConfig::default());
    assert_eq!(config.limits, Limits::of_machine());
    let site = config.site(None).unwrap();
    assert_eq!((site.name.as_str(), site.prefix.as_str(), site.nodes.len()), ("main", "main", 0));
    for (algorithm, codec) in [("lz4", CodecId::Lz4), ("snappy", CodecId::Snappy), ("none", CodecId::None)] {
        let config = parse(&format!("[compression]\nalgorithm = \"{algorithm}\"\n")).unwrap();
        assert_eq!(config.compression.wal, Compression { algorithm: codec, level: 0 });
    }
}

/// A configuration, what is wrong with it, and what is said to do (`""`: nothing).
const REFUSED: &[(&str, &str, &str)] = &[
    // what is not TOML
    ("[paths\n", "1: unclosed table, expected `]`", ""),
    ("a = 1\n\nb =\n", "3: string values must be quoted, expected literal string", ""),
    ("[paths]\nrun = \"/a\"\nrun = \"/b\"\n", "3: duplicate key", ""),
    ("[paths]\n[limits]\n[paths]\n", "3: duplicate key", ""),
    // unknown keys
    (
        "[sites.main]\nretension = 3\n",
        "2: unknown key \"retension\" in [sites.main]",
        "Did you mean \"retention\"?",
    ),
    ("[pahts]\n", "1: unknown key \"pahts\" at the top level", "Did you mean \"paths\"?"),
    (
        "[sites.main]\nurl = \"memory://\"\n",
        "2: unknown key \"url\" in [sites.main]",
        "\"url\" belongs in [storage].",
    ),
    (
        "connection = \"\"\n",
        "1: unknown key \"connection\" at the top level",
        "\"connection\" belongs in [sites.NAME].",
    ),
    (
        "[limits]\ncolour = 1\n",
        "2: unknown key \"colour\" in [limits]",
        "Known keys in [limits]: threads, transfers, memory, rate.",
    ),
    (
        "[[sites.main.nodes]]\nconnection = \"\"\nprefers = \"\"\n",
        "3: unknown key \"prefers\" in [sites.main.nodes]",
        "Did you mean \"prefer\"?",
    ),
    (
        "[encryption.keys.\"a b\"]\npublic_key = \"\"\n",
        "2: unknown key \"public_key\" in [encryption.keys.\"a b\"]",
        "Did you mean \"public_key_file\"?",
    ),
    (
        "sites.main.a.b = 1\n",
        "1: unknown key \"a\" in [sites.main]",
        "Known keys in [sites.main]: prefix, data_directory, bin_directory, connection, backup_source, wal, nodes, archive, storage.",
    ),
    // keys of later releases
    (
        "[sites.main.schedule]\nevery = \"24h\"\n",
        "1: \"schedule\" in [sites.main] does nothing yet",
        "It belongs to a later release of Walden: remove it until then, so that nobody relies on it.",
    ),
    (
        "[storage]\nurl = \"memory://\"\n[sites.main.archive]\nslot = \"my-slot\"\n",
        "4: \"slot\" in [sites.main.archive]: not a name for a replication slot",
        "Take lower-case letters, digits and _, at most 63.",
    ),
    // the first complaint is the first in the file, whatever its kind
    (
        "[storage]\nurl = 1\n[limits]\nx = 1\n",
        "2: \"url\" in [storage] should be a string, but is an integer",
        "Such as url = \"s3://backups/postgresql\".",
    ),
    (
        "[limits]\nx = 1\n[storage]\nurl = 1\n",
        "2: unknown key \"x\" in [limits]",
        "Known keys in [limits]: threads, transfers, memory, rate.",
    ),
    // wrong types
    (
        "[paths]\nstate = true\n",
        "2: \"state\" in [paths] should be a path (a string), but is a boolean",
        "Such as state = \"/srv/walden\".",
    ),
    (
        "[limits]\nthreads = \"4\"\n",
        "2: \"threads\" in [limits] should be an integer, but is a string",
        "Such as threads = 4.",
    ),
    (
        "[limits]\nmemory = 512\n",
        "2: \"memory\" in [limits] should be a size (a string such as \"512MiB\"), but is an integer",
        "Such as memory = \"512MiB\".",
    ),
    (
        "[encryption]\nrecipients = \"a\"\n",
        "2: \"recipients\" in [encryption] should be an array of strings, but is a string",
        "Such as recipients = [\"2026-11\"].",
    ),
    (
        "[encryption]\nrecipients = [\n  1]\n",
        "3: \"recipients\" in [encryption] should be an array of strings, but is an integer",
        "Such as recipients = [\"2026-11\"].",
    ),
    ("paths = 3.5\n", "1: \"paths\" at the top level should be a table, but is a number with a fraction", ""),
    ("[sites]\nmain = 2026-11-20\n", "2: \"main\" in [sites] should be a table, but is a time", ""),
    (
        "[sites.main]\nnodes = [[]]\n",
        "2: \"nodes\" in [sites.main] should be an array of tables, but is an array",
        "",
    ),
    ("[[storage]]\n", "1: \"storage\" at the top level should be a table, but is an array", ""),
    // wrong values
    ("[paths]\nrun = \"\"\n", "2: \"run\" in [paths]: the path is empty", ""),
    (
        "[paths]\nrun = \"~/run\"\n",
        "2: \"run\" in [paths]: \"~/run\" begins with ~, which only a shell understands",
        "Write the path in full.",
    ),
    ("[limits]\nthreads = 0\n", "2: \"threads\" in [limits]: 0 is not between 1 and 1024", ""),
    (
        "[limits]\ntransfers = 0x7fffffffffffffff\n",
        "2: \"transfers\" in [limits]: 9223372036854775807 is not between 1 and 1024",
        "",
    ),
    ("[limits]\nthreads = 99999999999999999999\n", "2: \"threads\" in [limits]: the number is too large", ""),
    ("[limits]\nrate = \"0B\"\n", "2: \"rate\" in [limits]: nothing would ever be read", ""),
    (
        "[limits]\nmemory = \"512MB\"\n",
        "2: \"memory\" in [limits]: unknown unit for a size",
        "Write a whole number and B, KiB, MiB, GiB or TiB (1024 each), such as \"512MiB\".",
    ),
    (
        "[limits]\nmemory = \"1MiB\"\n",
        "2: \"memory\" in [limits]: less than 64MiB is not enough to work with",
        "",
    ),
    (
        "[compression]\nalgorithm = \"zst\"\n",
        "2: \"algorithm\" in [compression]: \"zst\" is none of zstd, snappy, lz4, none",
        "Did you mean \"zstd\"?",
    ),
    (
        "[compression]\nlevel = 22\n",
        "2: \"level\" in [compression]: zstd has no level 22",
        "Choose a level from -7 to 19, and not 0.",
    ),
    (
        "[compression]\nalgorithm = \"lz4\"\nwal_level = 1\n",
        "3: \"wal_level\" in [compression]: lz4 has no level 1",
        "Leave the level out: this algorithm has none.",
    ),
    // storage
    (
        "[sites.main]\n",
        "1: \"url\" is missing in [storage]",
        "Such as url = \"file:///var/lib/walden/repo\".",
    ),
    ("[storage]\n", "1: \"url\" is missing in [storage]", "Such as url = \"file:///var/lib/walden/repo\"."),
    (
        "[storage]\n[sites.main]\n",
        "1: \"url\" is missing in [storage]",
        "Such as url = \"file:///var/lib/walden/repo\".",
    ),
    (
        "[storage]\nurl = \"memory://\"\n[sites.main]\n[sites.main.storage]\n",
        "4: \"url\" is missing in [sites.main.storage]",
        "Such as url = \"file:///var/lib/walden/repo\".",
    ),
    (
        "[storage]\nurl = \"/var/backups\"\n[sites.main]\n",
        "2: \"url\" in [storage]: cannot use \"/var/backups\" as the location of a repository: it is not a URL; write file:///var/backups; supported are file:///folder, s3://bucket/prefix and memory://",
        "",
    ),
    (
        "[storage]\nurl = \"memory://\"\nregion = \"x\"\n[sites.main]\n",
        "3: \"region\" in [storage]: only a store with an s3:// url has it",
        "",
    ),
    (
        "[storage]\nurl = \"s3://bucket\"\naccess_key_id = \"x\"\n[sites.main]\n",
        "1: \"secret_access_key_file\" is missing in [storage]",
        "With access_key_id it is needed as well.",
    ),
    (
        "[storage]\nurl = \"s3://bucket\"\naccess_key_id = \"x\"\nsecret_access_key = \"hunter2\"\nsecret_access_key_file = \"f\"\n[sites.main]\n",
        "5: \"secret_access_key_file\" in [storage]: the secret stands in secret_access_key as well",
        "Remove one of the two.",
    ),
    // encryption
    (
        "[encryption]\nrecipients = [\"2026-10\"]\n[encryption.keys.2026-11]\n",
        "2: \"recipients\" in [encryption] names key \"2026-10\", which is not configured",
        "Did you mean \"2026-11\"?",
    ),
    (
        "[encryption]\nsigner = \"a\"\n",
        "2: \"signer\" in [encryption] names key \"a\", which is not configured",
        "",
    ),
    (
        "[encryption]\nsigner = \"a\"\n[encryption.keys.a]\n",
        "2: \"signer\" in [encryption]: key \"a\" has no signing_key_file",
        "Add it below [encryption.keys.\"a\"].",
    ),
    (
        "[encryption]\ntrusted_signers = [\"a\"]\n[encryption.keys.a]\n",
        "2: \"trusted_signers\" in [encryption]: key \"a\" has no verify_key_file",
        "Add it below [encryption.keys.\"a\"].",
    ),
    (
        "[encryption]\nrecipients = [\"a\",\n  \"a\"]\n[encryption.keys.a]\n",
        "3: \"recipients\" in [encryption]: \"a\" is there twice",
        "",
    ),
    (
        "[encryption]\nrecipients = [\"a\"]\nwal_recipients = []\n[encryption.keys.a]\n",
        "3: \"wal_recipients\" in [encryption]: either both recipients and wal_recipients name keys, or none does",
        "Half of a backup in clear text is a backup in clear text.",
    ),
    // sites
    (
        "[storage]\nurl = \"memory://\"\n[sites.\"a/b\"]\n",
        "3: \"a/b\" in [sites]: not a name for a site",
        "Take letters, digits, _, - and . (not at the beginning), at most 64.",
    ),
    (
        "[storage]\nurl = \"memory://\"\n[sites.main]\nprefix = \"../x\"\n",
        "4: \"prefix\" in [sites.main]: not a folder for a site: object key \"../x\" has a component that begins with a dot",
        "",
    ),
    (
        "[storage]\nurl = \"memory://\"\n[sites.a]\n[sites.b]\nprefix = \"a\"\n",
        "4: \"b\" in [sites]: its prefix \"a\" lies in the same place as that of site \"a\"",
        "Give each site a prefix of its own.",
    ),
    (
        "[storage]\nurl = \"memory://\"\n[sites.a]\nconnection = \"\"\n[[sites.a.nodes]]\nconnection = \"\"\n",
        "4: \"connection\" in [sites.a]: there are nodes as well",
        "Write it as another [[…nodes]].",
    ),
    (
        "[storage]\nurl = \"memory://\"\n[[sites.a.nodes]]\n",
        "3: \"connection\" is missing in [sites.a.nodes]",
        "",
    ),
    (
        "[storage]\nurl = \"memory://\"\n[sites.a]\nconnection = \"hst=a\"\n",
        "4: \"connection\" in [sites.a]: connection settings: keyword \"hst\" is unknown",
        "",
    ),
    (
        "[storage]\nurl = \"memory://\"\n[sites.a.archive]\nfetch_wait = \"1 minute\"\n",
        "4: \"fetch_wait\" in [sites.a.archive]: unknown unit for a duration",
        "Write a whole number and ms, s, min, h or d, such as \"90s\".",
    ),
];

#[test]
fn every_mistake_is_said_with_file_line_and_key() {
    let mut wrong = Vec::new();
    for (text, message, hint) in REFUSED {
        let expected = (format!("/etc/walden/walden.toml:{message}"), (*hint).to_owned());
        let found = match parse(text) {
            Ok(_) => ("accepted".to_owned(), String::new()),
            Err(error) => (error.to_string(), error.hint().unwrap_or_default()),
        };
        if found != expected {
            wrong.push(format!("{text:?}\n  found    {found:?}\n  expected {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_site_is_the_named_one_or_the_only_one() {
    let message = |config: &Config, name: Option<&str>| {
        let error = config.site(name).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
        (error.to_string(), error.hint().unwrap())
    };
    let config = parse(WHOLE).unwrap();
    assert_eq!(
        message(&config, None),
        (
            "there are 2 sites, and none was chosen: main, other".into(),
            "Choose one with --site or WALDEN_SITE.".into()
        )
    );
    assert_eq!(
        message(&config, Some("mian")),
        ("unknown site \"mian\"".into(), "Did you mean \"main\"?".into())
    );
    assert_eq!(message(&config, Some("x")), ("unknown site \"x\"".into(), "Configured: main, other.".into()));
    let none = parse("").unwrap();
    assert_eq!(message(&none, None).0, "/etc/walden/walden.toml: no site is configured");
    assert_eq!(message(&none, Some("x")), ("unknown site \"x\"".into(), "No site is configured.".into()));
}

#[test]
fn a_file_with_a_secret_in_it_is_for_its_owner_alone() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("walden.toml");
    let load = || Config::load(Some(&file), &Environment::of(0, &[]));
    let shown = file.display();
    assert_eq!(
        load().unwrap_err().to_string(),
        format!("could not read the configuration file \"{shown}\": No such file or directory (os error 2)")
    );
    fs::write(&file, " ".repeat(5 << 20)).unwrap();
    assert!(load().unwrap_err().to_string().ends_with("walden.toml\": the file is too long"));
    let storage = "[storage]\nurl = \"s3://bucket\"\naccess_key_id = \"a\"\n";
    for (secret, refused) in [
        ("secret_access_key_file = \"s\"\n[sites.main]\n", false),
        ("secret_access_key = \"hunter2\"\n[sites.main]\n", true),
        ("secret_access_key_file = \"s\"\n[sites.main]\nconnection = \"host=a password=hunter2\"\n", true),
        ("secret_access_key_file = \"s\"\n[sites.main]\nconnection = \"postgres://a:hunter2@b\"\n", true),
    ] {
        fs::write(&file, format!("{storage}{secret}")).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        match load() {
            Ok(_) => assert!(!refused, "{secret}"),
            Err(error) => {
                assert!(refused, "{error}");
                let message = error.to_string();
                assert_eq!(
                    message,
                    format!(
                        "the configuration file, which holds a secret, \"{shown}\" has mode 0644: everybody can use it"
                    )
                );
                assert_eq!(error.hint().unwrap(), format!("chmod 600 {shown}"));
            }
        }
        fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        let config = load().unwrap();
        assert!(!format!("{config:?}").contains("hunter2"), "{config:?}");
    }
}

proptest! {
    /// Whatever an editor did to a file, the answer is a configuration or a complaint about a line that is there.
    #[test]
    fn a_mangled_configuration_is_read_or_complained_of(
        cut in any::<prop::sample::Index>(),
        len in 0..40_usize,
        inserted in "[ -~\n]{0,12}",
    ) {
        let characters: Vec<char> = WHOLE.chars().collect();
        let from = cut.index(characters.len());
        let to = (from + len).min(characters.len());
        let text: String = characters[..from].iter().copied().chain(inserted.chars()).chain(characters[to..].iter().copied()).collect();
        if let Err(Error::Content { place, .. }) = parse(&text) {
            prop_assert!((1..=text.lines().count() + 1).contains(&place.line), "{place}");
        }
    }

    #[test]
    fn arbitrary_text_does_not_panic(text in "\\PC{0,200}") {
        let _ = parse(&text);
    }
}
