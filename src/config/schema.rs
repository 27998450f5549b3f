//! Every section and key of the configuration file: what is accepted, what it means, what it is without.
//!
//! One table serves three ends: `document` checks a file against it before anything is read, the nearest key of
//! an unknown one is found in it, and `docs/configuration.md` is written from it. So a key is accepted exactly if
//! it is documented; and a test checks that each of them changes the resulting `Config`.

/// A table of the file: its name in documents, what it is for, and its keys.
#[derive(Debug)]
#[cfg_attr(not(test), expect(dead_code, reason = "what the document says is written by a test"))]
pub(super) struct Section {
    /// The header as one would write it, with capitals for names that the user chooses.
    pub header: &'static str,
    /// What the section is for.
    pub about: &'static str,
    /// The keys, in the order of the document.
    pub keys: &'static [Key],
}

/// A key of a section.
#[derive(Debug)]
#[cfg_attr(not(test), expect(dead_code, reason = "what the document says is written by a test"))]
pub(super) struct Key {
    pub name: &'static str,
    pub value: Value,
    /// What happens without it, for the document.
    pub default: &'static str,
    /// What it is, for the document.
    pub about: &'static str,
    /// A value as one would write it, for the document and for tests; empty for sections.
    pub example: &'static str,
}

/// What may stand behind a key.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value {
    Text,
    /// A path; relative ones are relative to the configuration file.
    Path,
    Texts,
    Boolean,
    Integer,
    /// A number with a unit of time, as text.
    Duration,
    /// A number with a unit of size, as text.
    Size,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A section.
    Table(&'static Section),
    /// Sections with names that the user chooses.
    NamedTables(&'static Section),
    /// A section that may be there several times.
    Tables(&'static Section),
    /// Anything; a later release will know it.
    Later,
}

impl Value {
    /// Returns what to call a value of this type, with its article.
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Text | Self::Choice(_) => "a string",
            Self::Path => "a path (a string)",
            Self::Texts => "an array of strings",
            Self::Boolean => "true or false",
            Self::Integer => "an integer",
            Self::Duration => "a duration (a string such as \"60s\")",
            Self::Size => "a size (a string such as \"512MiB\")",
            Self::Table(_) | Self::NamedTables(_) => "a table",
            Self::Tables(_) => "an array of tables",
            Self::Later => "left out",
        }
    }
}

const fn key(
    name: &'static str,
    value: Value,
    example: &'static str,
    default: &'static str,
    about: &'static str,
) -> Key {
    Key { name, value, default, about, example }
}

const fn section(name: &'static str, value: Value) -> Key {
    key(name, value, "", "", "")
}

const fn later(name: &'static str) -> Key {
    key(name, Value::Later, "", "", "")
}

/// The file as a whole.
pub(super) static ROOT: Section = Section {
    header: "",
    about: "",
    keys: &[
        section("paths", Value::Table(&PATHS)),
        section("storage", Value::Table(&STORAGE)),
        section("encryption", Value::Table(&ENCRYPTION)),
        section("compression", Value::Table(&COMPRESSION)),
        section("limits", Value::Table(&LIMITS)),
        section("sites", Value::NamedTables(&SITE)),
        later("daemon"),
        later("http"),
        later("metrics"),
        later("alerts"),
    ],
};

static PATHS: Section = Section {
    header: "[paths]",
    about: "Folders on this host. Each belongs to the caller (to anyone, when the caller is root) and cannot be \
            written by others; a missing one is created with mode 0700, `run` with 0711.",
    keys: &[
        key(
            "state",
            Value::Path,
            r#""/srv/walden""#,
            "`/var/lib/walden` for root, else `$XDG_STATE_HOME/walden` or `~/.local/state/walden`",
            "What Walden remembers between runs: page hashes, logs, clones.",
        ),
        key(
            "run",
            Value::Path,
            r#""/srv/walden/run""#,
            "`/run/walden` for root, else `$XDG_RUNTIME_DIR/walden` or `run` in the state folder",
            "The daemon's socket. Server and daemon have to mean the same folder: name it where they run as different users.",
        ),
        key(
            "clones",
            Value::Path,
            r#""/srv/clones""#,
            "`clones` in the state folder",
            "What clones write; needs ext4, xfs or btrfs.",
        ),
    ],
};

const STORAGE_KEYS: &[Key] = &[
    key(
        "url",
        Value::Text,
        r#""s3://backups/postgresql""#,
        "required",
        "Where the repository lies: `file:///FOLDER`, `s3://BUCKET/PREFIX` or, for tests, `memory://`.",
    ),
    key(
        "endpoint",
        Value::Text,
        r#""https://s3.example.org""#,
        "`AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, else AWS",
        "s3: the service, where it is not AWS.",
    ),
    key(
        "region",
        Value::Text,
        r#""eu-central-1""#,
        "`AWS_REGION`, `AWS_DEFAULT_REGION`, else `us-east-1`",
        "s3: the region.",
    ),
    key("access_key_id", Value::Text, r#""walden""#, "`AWS_ACCESS_KEY_ID`, else as above", "s3: who asks."),
    key(
        "secret_access_key",
        Value::Text,
        r#""not-a-good-place""#,
        "`AWS_SECRET_ACCESS_KEY`, else as above",
        "s3: the secret. The configuration file must then be readable by its owner alone; better is the next key.",
    ),
    key(
        "secret_access_key_file",
        Value::Path,
        r#""s3.secret""#,
        "none",
        "s3: a file that holds the secret, readable by its owner alone.",
    ),
    key(
        "session_token",
        Value::Text,
        r#""FwoGZXIvYXdz""#,
        "`AWS_SESSION_TOKEN`",
        "s3: the token of temporary credentials.",
    ),
    key(
        "path_style",
        Value::Boolean,
        "true",
        "`true` with an endpoint, else `false`",
        "s3: the bucket stands in the path and not in the host name.",
    ),
    key(
        "allow_http",
        Value::Boolean,
        "true",
        "`false`; loopback needs no permission",
        "s3: an endpoint without TLS is accepted.",
    ),
    key(
        "ca_file",
        Value::Path,
        r#""ca.pem""#,
        "the system's certificates",
        "s3: the certificate authority of the endpoint.",
    ),
    key("proxy", Value::Text, r#""http://proxy.example.org:3128""#, "none", "s3: the proxy to go through."),
    key(
        "timeout",
        Value::Duration,
        r#""30s""#,
        "`\"30s\"`",
        "s3: how long to wait for an answer, or for its next bytes, before a call counts as failed; a connection is \
         waited for 5 seconds at most.",
    ),
    key(
        "retry",
        Value::Duration,
        r#""2min""#,
        "`\"2min\"`",
        "How long a call is tried again where the store does not answer or is overloaded. `wal fetch` and `mount` \
         wait for less, as the server that asks them does.",
    ),
];

static STORAGE: Section = Section {
    header: "[storage]",
    about: "The object store that holds the repository. A site may name another one.\n\n\
            Credentials for s3 that stand neither here nor in `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` come from \
            the first of these that has some, as with AWS's own tools: the profile `AWS_PROFILE`, or `default`, of \
            `AWS_SHARED_CREDENTIALS_FILE` (`~/.aws/credentials`) and `AWS_CONFIG_FILE` (`~/.aws/config`), with keys or \
            with a role and a token file; `AWS_WEB_IDENTITY_TOKEN_FILE` with `AWS_ROLE_ARN`, asked of \
            `AWS_ENDPOINT_URL_STS`, `AWS_ENDPOINT_URL` or AWS; the agent of a container at \
            `AWS_CONTAINER_CREDENTIALS_RELATIVE_URI` or `AWS_CONTAINER_CREDENTIALS_FULL_URI`, with \
            `AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE` or `AWS_CONTAINER_AUTHORIZATION_TOKEN`; the role of the machine, \
            where the store is AWS's or `AWS_EC2_METADATA_SERVICE_ENDPOINT` is set. A source that is set up and fails is \
            an error. What expires is renewed. Profiles that need `source_profile`, `credential_process` or single \
            sign-on are refused.",
    keys: STORAGE_KEYS,
};

static SITE_STORAGE: Section = Section {
    header: "[sites.NAME.storage]",
    about: "The object store of this site; replaces `[storage]` as a whole.",
    keys: STORAGE_KEYS,
};

static ENCRYPTION: Section = Section {
    header: "[encryption]",
    about: "Who can read what is stored, and whose word is taken for it. Without this section nothing is encrypted \
            and nothing is signed, and Walden says so.",
    keys: &[
        key(
            "recipients",
            Value::Texts,
            r#"["2026-11"]"#,
            "`[]`: signed, but not encrypted",
            "The keys that can read basebackups; each needs a `public_key_file` where backups are written.",
        ),
        key(
            "wal_recipients",
            Value::Texts,
            r#"["standby"]"#,
            "`recipients`",
            "The keys that can read WAL, if others.",
        ),
        key(
            "signer",
            Value::Text,
            r#""2026-11""#,
            "none: this host writes nothing",
            "The key that vouches for what this host writes; needs a `signing_key_file`.",
        ),
        key(
            "trusted_signers",
            Value::Texts,
            r#"["2026-11"]"#,
            "none: unsigned objects are taken, with a warning",
            "The keys whose signature this host accepts; each needs a `verify_key_file`.",
        ),
        section("keys", Value::NamedTables(&KEY)),
    ],
};

static KEY: Section = Section {
    header: "[encryption.keys.ID]",
    about: "The files of one key, as `walden key create` writes them. A host has those that it needs.",
    keys: &[
        key(
            "public_key_file",
            Value::Path,
            r#""2026-11.pub.pem""#,
            "none",
            "The recipient's public key (RSA): to write what the recipient can read.",
        ),
        key(
            "private_key_file",
            Value::Path,
            r#""2026-11.pem""#,
            "none",
            "The recipient's private key, readable by its owner alone: only where backups are read.",
        ),
        key(
            "signing_key_file",
            Value::Path,
            r#""2026-11.sign.pem""#,
            "none",
            "The signer's private key (Ed25519), readable by its owner alone: only where backups are written or expired.",
        ),
        key(
            "verify_key_file",
            Value::Path,
            r#""2026-11.verify.pem""#,
            "none",
            "The signer's public key: where backups are read.",
        ),
    ],
};

static COMPRESSION: Section = Section {
    header: "[compression]",
    about: "How data is compressed before it is encrypted. What is stored already stays as it is.",
    keys: &[
        key(
            "algorithm",
            Value::Choice(&["zstd", "snappy", "lz4", "none"]),
            r#""lz4""#,
            "`\"zstd\"`",
            "`zstd`, `snappy`, `lz4` or `none`.",
        ),
        key(
            "level",
            Value::Integer,
            "6",
            "3 for zstd",
            "The level of zstd for basebackups; the other algorithms have none.",
        ),
        key("wal_level", Value::Integer, "3", "-1 for zstd", "The level of zstd for WAL."),
    ],
};

static LIMITS: Section = Section {
    header: "[limits]",
    about: "How much of the machine Walden takes.",
    keys: &[
        key(
            "threads",
            Value::Integer,
            "4",
            "the number of processors",
            "Threads that hash, compress and encrypt.",
        ),
        key("transfers", Value::Integer, "16", "8", "Requests to the store that are under way at once."),
        key(
            "memory",
            Value::Size,
            r#""512MiB""#,
            "a quarter of the machine's, at most 256 MiB",
            "Memory for data on its way and for caches.",
        ),
        key(
            "rate",
            Value::Size,
            r#""100MiB""#,
            "no limit",
            "What a basebackup takes of the server's files in a second, read or received; `--rate-limit` says otherwise for one.",
        ),
    ],
};

static SITE: Section = Section {
    header: "[sites.NAME]",
    about: "A cluster and its backups, with the history of both. NAME is chosen freely from letters, digits, `_`, `-` and `.`.",
    keys: &[
        key(
            "prefix",
            Value::Text,
            r#""prod-main""#,
            "the site's name",
            "The folder of the site in the repository.",
        ),
        key(
            "data_directory",
            Value::Path,
            r#""/var/lib/postgresql/15/main""#,
            "what the server says",
            "The data directory of the server.",
        ),
        key(
            "bin_directory",
            Value::Path,
            r#""/usr/lib/postgresql/15/bin""#,
            "by the data directory's version, in the known places",
            "The programs of PostgreSQL.",
        ),
        key(
            "connection",
            Value::Text,
            r#""host=/run/postgresql user=walden""#,
            "none: this host does not connect",
            "The server, in libpq's syntax or as a URL: the short form of one node.",
        ),
        key(
            "backup_source",
            Value::Choice(&["data-directory", "replication"]),
            r#""replication""#,
            "`\"data-directory\"`",
            "Where basebackups come from: `data-directory` reads the server's on this host; `replication` has a server \
             on any host send it (BASE_BACKUP), all of it each time though only what differs is stored, or from 17 on \
             with `summarize_wal` only what has changed, to a role with REPLICATION that pg_hba.conf lets in for \
             `replication`.",
        ),
        key(
            "wal",
            Value::Choice(&["push", "receive"]),
            r#""receive""#,
            "`\"push\"`",
            "How WAL comes into the archive: `push` by the server's archive_command, `receive` by streaming, which \
             `walden daemon` does, or `walden wal receive`.",
        ),
        section("nodes", Value::Tables(&NODE)),
        section("archive", Value::Table(&ARCHIVE)),
        section("storage", Value::Table(&SITE_STORAGE)),
        later("active"),
        later("schedule"),
        later("retention"),
    ],
};

static NODE: Section = Section {
    header: "[[sites.NAME.nodes]]",
    about: "One of several servers of the site. A basebackup asks them all, and is taken from the first whose data directory is on this host: those in the role they are preferred in come first, then the others.",
    keys: &[
        key(
            "connection",
            Value::Text,
            r#""host=db1 user=walden""#,
            "required",
            "The server, in libpq's syntax or as a URL. Passwords come from `PGPASSFILE`, `~/.pgpass` or a service file.",
        ),
        key(
            "prefer",
            Value::Choice(&["primary", "standby"]),
            r#""standby""#,
            "`\"primary\"`",
            "The role in which the node comes before the others: `primary` or `standby`.",
        ),
    ],
};

static ARCHIVE: Section = Section {
    header: "[sites.NAME.archive]",
    about: "How WAL comes into the archive by streaming, and how it comes back.",
    keys: &[
        key(
            "fetch_wait",
            Value::Duration,
            r#""90s""#,
            "`\"60s\"`",
            "How long `wal fetch` asks again for a segment that should be there, before it stops recovery.",
        ),
        key(
            "queue_max",
            Value::Size,
            r#""64GiB""#,
            "none: all of it waits",
            "How much WAL may wait for the archive. `wal push` reports what is beyond that as archived and LEAVES IT OUT, so that `pg_wal` does not fill up: nothing is recovered across the gap, `walden check` fails until a basebackup is taken behind it, and each file is an error in the server's log.",
        ),
        key(
            "ack",
            Value::Choice(&["spool", "store"]),
            r#""store""#,
            "`\"spool\"`",
            "`wal = \"receive\"`: when the server is told that WAL is durable: once it is synced below `state` on this \
             host (`spool`), or once it is in the store (`store`).",
        ),
        key(
            "slot",
            Value::Text,
            r#""backup""#,
            "`walden_` and the site's name",
            "`wal = \"receive\"`: the physical replication slot, which is created where there is none.",
        ),
    ],
};
