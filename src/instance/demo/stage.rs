//! What a demonstration has running, and how all of it ends.
//!
//! Everything that must not be left behind is known here before it is started, so that cleaning up works from any
//! moment: first by the commands that end things properly, then by force for what is still there.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use serde::Deserialize;

use crate::clock::Clock;
use crate::instance::demo::DemoOptions;
use crate::instance::demo::cluster::{self, Cluster};
use crate::instance::demo::commands::{As, Walden};
use crate::instance::demo::error::DemoError;
use crate::instance::demo::leftovers::{self, OurPrograms};
use crate::instance::demo::report::MountFigures;
use crate::instance::demo::scratch::{self, Scratch};
use crate::replication::ConnectOptions;

/// A process that was told to end is given this long, twice: once to end in order, once to be gone.
const ENDING_MAX: Duration = Duration::from_secs(5);
const ENDING_POLL: Duration = Duration::from_millis(50);

/// The folder, the commands, and what they have started.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) scratch: Scratch,
    pub(super) walden: Walden,
    bin_directory: PathBuf,
    clock: Arc<dyn Clock>,
    cluster: Option<Cluster>,
    mounted: bool,
    clones: Vec<String>,
    keep: bool,
}

/// What is read from `clone status`.
#[derive(Debug, Deserialize)]
pub(super) struct CloneDocument {
    socket_directory: PathBuf,
    port: u16,
    superuser: String,
    pub(super) bytes_fetched: u64,
    pub(super) requests: u64,
}

impl CloneDocument {
    /// Returns how to connect to the loaded database of the clone.
    pub(super) fn connect_options(&self) -> Result<ConnectOptions, DemoError> {
        let source = ConnectOptions::new(cluster::connection(&self.socket_directory.display().to_string()));
        Ok(source.with("port", &self.port.to_string())?.with("user", &self.superuser)?)
    }
}

impl Stage {
    /// Makes the folder; nothing runs yet.
    pub(super) fn create(
        options: &DemoOptions,
        bin_directory: PathBuf,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, DemoError> {
        let scratch = Scratch::create(&options.parent, options.scale)?;
        let binary = match scratch.reachable_binary(&options.binary) {
            Ok(binary) => binary,
            Err(error) => {
                // Nothing but the folder is there yet.
                scratch.remove()?;
                return Err(error);
            }
        };
        let walden = Walden {
            binary,
            config: scratch.join("walden.toml"),
            home: scratch.path().to_owned(),
            account: scratch.account().clone(),
        };
        let keep = options.keep;
        Ok(Self {
            scratch,
            walden,
            bin_directory,
            clock,
            cluster: None,
            mounted: false,
            clones: Vec::new(),
            keep,
        })
    }

    /// Writes the configuration, with the keys as `key create` proposes them.
    pub(super) fn configure(&self, encryption: &str) -> Result<(), DemoError> {
        let connection = cluster::connection(&self.scratch.join("run").display().to_string());
        let folder = self.scratch.path();
        let text = scratch::configuration(folder, &self.bin_directory, &connection, encryption);
        self.scratch.write("walden.toml", &text)?;
        Ok(())
    }

    /// Initializes and starts the cluster.
    pub(super) async fn start_cluster(&mut self) -> Result<(), DemoError> {
        let archive_command = self.walden.archive_command();
        let (bin, clock) = (self.bin_directory.clone(), self.clock.clone());
        let cluster = self.cluster.insert(Cluster::prepare(&self.scratch, bin, clock)?);
        cluster.initdb(&archive_command).await?;
        cluster.start().await
    }

    /// Returns the cluster, which is there once it was started.
    pub(super) fn cluster(&mut self) -> Result<&mut Cluster, DemoError> {
        let missing = || DemoError::Server { what: "is not there", log: String::new() };
        self.cluster.as_mut().ok_or_else(missing)
    }

    /// Mounts the repository and returns where.
    pub(super) async fn mount(&mut self) -> Result<PathBuf, DemoError> {
        let folder = self.scratch.join("mnt");
        self.mounted = true;
        self.walden.run_text(As::Caller, &["mount", &folder.display().to_string()]).await?;
        Ok(folder)
    }

    /// Unmounts the repository.
    pub(super) async fn unmount(&mut self) -> Result<(), DemoError> {
        let folder = self.scratch.join("mnt").display().to_string();
        self.walden.run_text(As::Caller, &["unmount", &folder]).await?;
        self.mounted = false;
        Ok(())
    }

    /// Creates a clone at the end of the archive.
    pub(super) async fn create_clone(&mut self, name: &str) -> Result<CloneDocument, DemoError> {
        self.clones.push(name.to_owned());
        // What it costs is what the queries cost.
        self.walden.run(As::Caller, &["clone", "create", name, "--no-hydrate"]).await
    }

    /// Asks a clone how it is.
    pub(super) async fn clone_status(&self, name: &str) -> Result<CloneDocument, DemoError> {
        self.walden.run(As::Caller, &["clone", "status", name]).await
    }

    /// Deletes a clone.
    pub(super) async fn delete_clone(&mut self, name: &str) -> Result<(), DemoError> {
        self.walden.run_text(As::Caller, &["clone", "delete", name]).await?;
        self.clones.retain(|clone| clone != name);
        Ok(())
    }

    /// Returns the folder, if it is to be kept.
    pub(super) fn kept_folder(&self) -> Option<PathBuf> {
        self.keep.then(|| self.scratch.path().to_owned())
    }

    /// Ends whatever is there and removes the folder, unless it is to be kept.
    pub(super) async fn clean_up(mut self) -> Result<(), DemoError> {
        for clone in std::mem::take(&mut self.clones) {
            // What the command could not end is found below.
            let _ = self.delete_clone(&clone).await;
        }
        if self.mounted {
            let _ = self.unmount().await;
        }
        if let Some(cluster) = &mut self.cluster {
            let _ = cluster.stop().await;
        }
        let left = self.end_by_force().await;
        if !left.is_empty() {
            return Err(DemoError::LeftBehind { folder: self.scratch.path().to_owned(), left });
        }
        if self.keep { Ok(()) } else { self.scratch.remove() }
    }

    /// Ends what the commands have left, and lists what withstands that too.
    async fn end_by_force(&self) -> Vec<String> {
        let ours =
            OurPrograms { walden: self.walden.binary.clone(), bin_directory: self.bin_directory.clone() };
        // Who served a mount ends by itself soon after it; only what does not is told to.
        for signal in [None, Some(Signal::SIGTERM), Some(Signal::SIGKILL)] {
            self.signal_and_wait(&ours, signal).await;
        }
        for mount in leftovers::mounts(&self.scratch) {
            // A mount that stays is in the list below.
            let _ = leftovers::detach(&mount);
        }
        let mounts = leftovers::mounts(&self.scratch);
        let mounts = mounts.iter().map(|mount| format!("\"{}\" is mounted", mount.display()));
        let processes = leftovers::processes(&self.scratch, &ours);
        mounts.chain(processes.iter().map(|pid| format!("process {pid} runs"))).collect()
    }

    async fn signal_and_wait(&self, ours: &OurPrograms, signal: Option<Signal>) {
        let deadline = self.clock.monotonic() + ENDING_MAX;
        let mut processes = leftovers::processes(&self.scratch, ours);
        for pid in &processes {
            let _ = kill(*pid, signal);
        }
        while !processes.is_empty() && self.clock.monotonic() < deadline {
            tokio::time::sleep(ENDING_POLL).await;
            processes = leftovers::processes(&self.scratch, ours);
        }
    }
}

/// Walks the newest basebackup in the mount, as `find` and `ls -l` would.
pub(super) async fn look_around(mount: PathBuf, took: Duration) -> Result<MountFigures, DemoError> {
    let walk = move || {
        let mut figures = MountFigures { seconds: took.as_secs_f64(), ..MountFigures::default() };
        walk(&mount.join("basebackups/latest/data"), &mut figures)?;
        let wal = mount.join("wal");
        for entry in std::fs::read_dir(&wal).map_err(DemoError::at("list", &wal))? {
            let name = entry.map_err(DemoError::at("list", &wal))?.file_name();
            figures.wal_segments += u64::from(name.len() == 24);
        }
        Ok(figures)
    };
    // A walk that panicked is as good as one that could not be made.
    tokio::task::spawn_blocking(walk).await.unwrap_or_else(|error| {
        Err(DemoError::Document {
            command: "the walk through the mount".to_owned(),
            detail: error.to_string(),
        })
    })
}

fn walk(folder: &Path, figures: &mut MountFigures) -> Result<(), DemoError> {
    for entry in std::fs::read_dir(folder).map_err(DemoError::at("list", folder))? {
        let path = entry.map_err(DemoError::at("list", folder))?.path();
        let metadata = path.symlink_metadata().map_err(DemoError::at("stat", &path))?;
        if metadata.is_dir() {
            walk(&path, figures)?;
        } else {
            figures.files += 1;
            figures.bytes += metadata.len();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_walk_counts_files_and_segments() {
        let mount = tempfile::tempdir().unwrap();
        let data = mount.path().join("basebackups/one/data");
        std::fs::create_dir_all(data.join("base/5")).unwrap();
        std::os::unix::fs::symlink("one", mount.path().join("basebackups/latest")).unwrap();
        std::fs::write(data.join("PG_VERSION"), "15\n").unwrap();
        std::fs::write(data.join("base/5/1259"), [0; 8192]).unwrap();
        std::fs::create_dir(mount.path().join("wal")).unwrap();
        std::fs::write(mount.path().join("wal/000000010000000000000001"), "").unwrap();
        std::fs::write(mount.path().join("wal/00000002.history"), "").unwrap();
        let figures = look_around(mount.path().to_owned(), Duration::from_millis(1500)).await.unwrap();
        assert_eq!(figures, MountFigures { seconds: 1.5, files: 2, bytes: 8195, wal_segments: 1 });
        look_around(mount.path().join("none"), Duration::ZERO).await.unwrap_err();
    }

    #[test]
    fn a_clone_is_reached_by_what_its_status_says() {
        let status = r#"{"name":"demo","socket_directory":"/c/run","port":5433,"superuser":"me",
                         "bytes_fetched":7,"requests":2,"state":"running"}"#;
        let status: CloneDocument = serde_json::from_str(status).unwrap();
        assert_eq!(
            status.connect_options().unwrap().conninfo,
            "dbname='demo' host='/c/run' port='5433' user='me'"
        );
    }
}
