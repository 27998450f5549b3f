//! The binary as its users run it: a configuration, a repository in a folder, keys, and the outcome of commands.
//!
//! Commands run as PostgreSQL's account, as they do from `archive_command` and from a DBA's shell; `as_root` is for what
//! wants root.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use super::scratch::{mounts_below, unmount};
use super::test_store::{TestStore, report};
use super::{Account, Run, Scratch, Sql, wait_for};

/// Walden with its configuration in a scratch folder.
#[derive(Debug, Clone)]
pub struct Walden {
    binary: PathBuf,
    folder: PathBuf,
    root: bool,
    /// What holds the repository, where that is not a folder.
    store: Option<Arc<TestStore>>,
}

/// What is written into `walden.toml`.
#[derive(Debug, Clone)]
pub struct Site {
    data_directory: Option<PathBuf>,
    nodes: String,
    bin_directory: Option<PathBuf>,
    encrypted: bool,
    storage: Option<String>,
    keys: String,
    lines: String,
}

impl Site {
    /// Describes a site for the cluster at `sql`, encrypted, in a repository beside the configuration.
    pub fn of(sql: &Sql, data_directory: &Path) -> Self {
        Self {
            data_directory: Some(data_directory.to_owned()),
            nodes: format!("connection = \"{}\"\n", sql.connection()),
            bin_directory: None,
            encrypted: true,
            storage: None,
            keys: String::new(),
            lines: String::new(),
        }
    }

    /// Names the folder of PostgreSQL's programs, where Walden would not look by itself.
    pub fn bin_directory(mut self, folder: &Path) -> Self {
        self.bin_directory = Some(folder.to_owned());
        self
    }

    /// Leaves the data directory to the server, and names several: connection and preferred role of each.
    pub fn nodes(mut self, nodes: &[(&str, &str)]) -> Self {
        let node = |(connection, prefer): &(&str, &str)| {
            format!("[[sites.main.nodes]]\nconnection = \"{connection}\"\nprefer = \"{prefer}\"\n")
        };
        self.nodes = nodes.iter().map(node).collect();
        self.data_directory = None;
        self
    }

    /// Leaves encryption out.
    pub fn unencrypted(mut self) -> Self {
        self.encrypted = false;
        self
    }

    /// Puts the repository elsewhere: the lines of `[storage]`.
    pub fn storage(mut self, lines: &str) -> Self {
        self.storage = Some(lines.to_owned());
        self
    }

    /// Adds a line to the site itself.
    pub fn key(mut self, line: &str) -> Self {
        self.keys += &format!("{line}\n");
        self
    }

    /// Adds lines at the end, with their own `[section]`.
    pub fn lines(mut self, lines: &str) -> Self {
        self.lines += lines;
        self
    }
}

impl Walden {
    /// Prepares the folders, and the binary where PostgreSQL's account can run it; there is no configuration yet.
    pub fn new(scratch: &Scratch) -> Self {
        let built = Path::new(env!("CARGO_BIN_EXE_walden"));
        let binary =
            if reachable_by_all(built) { built.to_owned() } else { scratch.path().join("walden-binary") };
        if binary != built {
            fs::copy(built, &binary).unwrap();
            fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self { binary, folder: scratch.folder("walden"), root: false, store: None }
    }

    /// Prepares everything: keys if the site is encrypted, and `walden.toml`.
    #[track_caller]
    pub fn configure(scratch: &Scratch, site: &Site) -> Self {
        let mut walden = Self::new(scratch);
        for folder in ["walden/state", "walden/run", "walden/clones", "walden/repository"] {
            scratch.folder(folder);
        }
        if site.encrypted {
            let keys = ["key", "create", "--id", "test", "--bits", "3072"];
            Run::of(walden.bare_command().args(keys).current_dir(&walden.folder), "").expect_success();
        }
        match site.storage {
            None => walden.store = TestStore::start(&walden.folder.join("repository")).map(Arc::new),
            Some(_) => report("own", "it has a store of its own"),
        }
        scratch.file("walden/walden.toml", &walden.configuration(site));
        walden
    }

    /// Writes `walden.toml` anew, beside the keys there are.
    #[track_caller]
    pub fn reconfigure(&self, scratch: &Scratch, site: &Site) {
        scratch.file("walden/walden.toml", &self.configuration(site));
    }

    /// Returns the same Walden, run as root.
    pub fn as_root(&self) -> Self {
        Self { root: true, ..self.clone() }
    }

    /// Returns the binary, where PostgreSQL's account can run it.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Returns the lines of `[storage]` of its own repository, for another site.
    pub fn storage(&self) -> String {
        match &self.store {
            Some(store) => store.storage(),
            None => format!("url = \"file://{}\"", self.repository().display()),
        }
    }

    /// Returns where its own repository is: a folder, reached as S3 or not.
    pub fn repository(&self) -> PathBuf {
        if let Some(store) = &self.store {
            store.assert_has_files();
        }
        self.folder.join("repository")
    }

    /// Returns the path of `walden.toml`.
    pub fn configuration_file(&self) -> PathBuf {
        self.folder.join("walden.toml")
    }

    /// Makes a command with the configuration and nothing else.
    pub fn command(&self) -> Command {
        let mut command = self.bare_command();
        command.arg("--config").arg(self.configuration_file());
        command
    }

    /// Runs a command to its end, whatever that is.
    #[track_caller]
    pub fn try_run(&self, arguments: &[&str]) -> Run {
        Run::of(self.command().args(arguments), "")
    }

    /// Runs a command that has to succeed.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Run {
        self.try_run(arguments).expect_success()
    }

    /// Runs a command that has to succeed and reads the document it prints.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let run = Run::of(self.command().args(["--output", "json"]).args(arguments), "").expect_success();
        serde_json::from_str(&run.stdout)
            .unwrap_or_else(|error| panic!("{}: {error}\n{}", run.command, run.stdout))
    }

    /// Starts a command that goes on; it is killed when dropped.
    pub fn start(&self, arguments: &[&str]) -> Running {
        let mut command = self.command();
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Running { process: command.spawn().unwrap() }
    }

    /// Mounts the site on a folder; it is unmounted when the guard is dropped.
    #[track_caller]
    pub fn mount(&self, folder: &Path) -> Mounted {
        let mounted = Mounted { folder: folder.to_owned() };
        self.run(&["mount", folder.to_str().expect("scratch folders have plain names")]);
        wait_for("the mount to be there", || is_mounted(folder).then_some(()));
        mounted
    }

    /// Returns the `archive_command` of this configuration.
    pub fn archive_command(&self) -> String {
        format!("{} wal push %p", self.command_line())
    }

    /// Returns the `restore_command` of this configuration.
    pub fn restore_command(&self) -> String {
        format!("{} wal fetch %f %p", self.command_line())
    }

    fn command_line(&self) -> String {
        format!("{} --config {}", self.binary.display(), self.configuration_file().display())
    }

    fn bare_command(&self) -> Command {
        let mut command = if self.root {
            Command::new(&self.binary)
        } else {
            Account::of_postgresql().command(&self.binary)
        };
        // Nothing of the developer's own set-up may decide a test.
        for (name, _) in std::env::vars()
            .filter(|(name, _)| ["WALDEN_", "PG", "AWS_"].iter().any(|it| name.starts_with(it)))
        {
            command.env_remove(name);
        }
        command.env("HOME", &self.folder);
        command
    }

    fn configuration(&self, site: &Site) -> String {
        let folder = self.folder.display();
        let storage = site.storage.clone().unwrap_or_else(|| self.storage());
        let encryption = if site.encrypted { ENCRYPTION } else { "" };
        let path = |key, path: &Option<PathBuf>| {
            path.as_ref().map(|path| format!("{key} = \"{}\"\n", path.display())).unwrap_or_default()
        };
        format!(
            "[paths]\nstate = \"{folder}/state\"\nrun = \"{folder}/run\"\nclones = \"{folder}/clones\"\n\n\
             [storage]\n{storage}\n\n{encryption}\
             [sites.main]\n{}{}{}{}\n{}",
            site.keys,
            path("data_directory", &site.data_directory),
            path("bin_directory", &site.bin_directory),
            site.nodes,
            site.lines
        )
    }
}

/// The keys of `walden key create --id test`, beside the configuration.
const ENCRYPTION: &str = r#"[encryption]
recipients = ["test"]
signer = "test"
trusted_signers = ["test"]

[encryption.keys.test]
public_key_file = "test.pub.pem"
private_key_file = "test.pem"
signing_key_file = "test.sign.pem"
verify_key_file = "test.verify.pem"

"#;

/// A command that runs until dropped.
#[derive(Debug)]
pub struct Running {
    pub process: Child,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A mount that ends with the test.
#[derive(Debug)]
pub struct Mounted {
    folder: PathBuf,
}

impl Mounted {
    /// Returns the folder it is on.
    pub fn path(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if is_mounted(&self.folder) {
            unmount(&self.folder);
        }
    }
}

fn is_mounted(folder: &Path) -> bool {
    mounts_below(folder).iter().any(|mount| mount == folder)
}

/// Whether any account may run the file where it is: a build below `/root` is closed to user postgres.
fn reachable_by_all(file: &Path) -> bool {
    let open = |path: &Path| fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o001 != 0);
    file.ancestors().all(open)
}
