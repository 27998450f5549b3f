//! The server of a restore: one that was started here, or one that somebody else has started on the mount.
//!
//! `pg_ctl`, or Debian's `pg_ctlcluster`, stops ours by its `postmaster.pid` and may start another in its place; that one is
//! recognised by the directory it works in, and not fought. Both are stopped before the mount goes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::control::RestoredSetting;
use crate::disk::Owner;
use crate::instance::instant::unfinished::{InstantSpec, Unfinished};
use crate::instance::launch::Launch;
use crate::instance::postmaster::Postmaster;
use crate::instance::server::{ServerError, StopMode};
use crate::pg::PostmasterPid;
use crate::restore::recovery_settings::Setting;

/// A server that runs, or none.
#[derive(Debug, Default)]
pub(super) struct Running {
    own: Option<Postmaster>,
    /// What that one has on its command line.
    settings: Vec<RestoredSetting>,
    foreign: Option<Pid>,
}

/// A fast stop writes a checkpoint through the mount; after this it is told to end at once.
const STOP_WAIT: Duration = Duration::from_secs(60);
/// How long one that was told to end at once is waited for.
const END_WAIT: Duration = Duration::from_secs(10);
/// How often a server is looked at that is no child of this process.
const STOP_LOOK: Duration = Duration::from_millis(50);

impl Running {
    /// Takes over one that was started here, by an order.
    pub(super) fn started(&mut self, postmaster: Postmaster, launch: &Launch) {
        self.own = Some(postmaster);
        self.settings = settings_of(launch);
        self.foreign = None;
    }

    /// Returns what the one that runs has on its command line; of somebody else's nothing is known.
    pub(super) fn settings(&self) -> &[RestoredSetting] {
        if self.own.is_some() { &self.settings } else { &[] }
    }

    /// Returns its process, if there is one.
    pub(super) fn pid(&self) -> Option<Pid> {
        self.own.as_ref().map(Postmaster::pid).or(self.foreign)
    }

    /// Tells whether the one that runs was started by somebody else.
    pub(super) fn is_foreign(&self) -> bool {
        self.own.is_none() && self.foreign.is_some()
    }

    /// Waits until the one that was started here ends; for ever where none was.
    pub(super) async fn own_ended(&mut self) -> io::Result<ExitStatus> {
        match &mut self.own {
            Some(own) => own.wait().await,
            None => std::future::pending().await,
        }
    }

    /// Forgets the one that was started here, which has ended.
    pub(super) fn forget_own(&mut self) {
        self.own = None;
    }

    /// Looks for one that somebody else has started; true where one was found that was not known.
    ///
    /// The file is its owner's to write, and what it names is stopped: it must be his as well.
    pub(super) fn look_for_others(
        &mut self,
        file: Option<&PostmasterPid>,
        data: &Path,
        owner: Owner,
    ) -> bool {
        if self.own.is_some() {
            return false;
        }
        let before = self.foreign;
        let is_one = |pid: &Pid| works_in(*pid, data) && is_of(*pid, owner);
        let named = file.map(|file| Pid::from_raw(file.pid)).filter(is_one);
        // One that has removed its file is there until its last process is.
        self.foreign = named.or(before.filter(|pid| works_in(*pid, data)));
        self.foreign.is_some() && self.foreign != before
    }

    /// Stops it, whoever started it.
    pub(super) async fn stop(&mut self, mode: StopMode, data: &Path) -> Result<(), ServerError> {
        if let Some(mut own) = self.own.take() {
            return own.stop(mode, STOP_WAIT).await;
        }
        let Some(foreign) = self.foreign.take() else { return Ok(()) };
        for (signal, wait) in [(Signal::SIGINT, STOP_WAIT), (Signal::SIGQUIT, END_WAIT)] {
            let _ = kill(foreign, signal);
            let ended = async {
                while works_in(foreign, data) {
                    tokio::time::sleep(STOP_LOOK).await;
                }
            };
            if tokio::time::timeout(wait, ended).await.is_ok() {
                return Ok(());
            }
        }
        let _ = kill(foreign, Signal::SIGKILL);
        Err(ServerError::StillRunning(STOP_WAIT))
    }
}

/// Returns settings as they are told.
pub(super) fn restored(settings: &[Setting]) -> Vec<RestoredSetting> {
    let told =
        |Setting { name, value }: &Setting| RestoredSetting { name: name.clone(), value: value.clone() };
    settings.iter().map(told).collect()
}

/// Returns the settings in the arguments of a server.
fn settings_of(launch: &Launch) -> Vec<RestoredSetting> {
    let given = launch.arguments.windows(2).filter(|pair| pair[0] == "-c");
    let given = given.filter_map(|pair| pair[1].to_str()?.split_once('='));
    given.map(|(name, value)| RestoredSetting { name: name.to_owned(), value: value.to_owned() }).collect()
}

/// Tells whether a process works in a directory, by the text of its link: a look at the directory itself would go through
/// our own mount.
fn works_in(pid: Pid, data: &Path) -> bool {
    fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data)
}

/// Tells whose a process is.
fn is_of(pid: Pid, owner: Owner) -> bool {
    Owner::of(format!("/proc/{pid}").as_ref()).is_ok_and(|found| found.uid == owner.uid)
}

/// Returns how the server is started on the mount; `pid_file` is where it writes its own beneath.
pub(super) fn launch(
    unfinished: &Unfinished,
    is_recovering: bool,
    pid_file: PathBuf,
    log_file: PathBuf,
    environment: Vec<(String, String)>,
) -> Launch {
    let Unfinished { plan, spec } = unfinished;
    let data = &plan.destinations.data;
    let mut arguments = vec!["-D".into(), data.clone().into_os_string()];
    for (name, value) in settings(spec, data, is_recovering) {
        arguments.push("-c".into());
        arguments.push(format!("{name}={value}").into());
    }
    Launch {
        program: spec.bin_directory.join("postgres"),
        arguments,
        data_directory: data.clone(),
        pid_file,
        owner: plan.owner,
        isolation: None,
        log_file,
        environment,
        supervisor: std::process::id(),
    }
}

/// Decides what the server is told on its command line: a name that its version does not know would keep it from starting.
fn settings(spec: &InstantSpec, data: &Path, is_recovering: bool) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    let mut set = |name, value: &str| settings.push((name, value.to_owned()));
    if let Some(file) = &spec.config_file {
        set("config_file", &file.display().to_string());
        // A configuration that is somebody's may name another directory.
        set("data_directory", &data.display().to_string());
    }
    // The uppers are synced before each start, and a server that starts again by itself would not wait for that.
    set("restart_after_crash", "off");
    if spec.major >= 14 {
        set("recovery_init_sync_method", "syncfs");
    }
    if spec.major >= 15 && is_recovering && spec.full_page_writes {
        // Replay brings the pages itself, and the server would have them fetched all the same.
        set("recovery_prefetch", "off");
    }
    if spec.major >= 18 {
        // io_uring on a file of the mount waits in the kernel.
        set("io_method", "worker");
    }
    settings
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::instance::clone_folder::HydrateSpec;

    fn spec(major: u32) -> InstantSpec {
        InstantSpec {
            format: 1,
            site: "main".to_owned(),
            pin: None,
            hydrate: HydrateSpec { in_background: true, rate: None },
            cut_over: false,
            major,
            bin_directory: "/usr/bin".into(),
            config_file: None,
            full_page_writes: true,
            superuser: "postgres".to_owned(),
            began_at: "2026-11-22T06:00:00Z".parse().unwrap(),
        }
    }

    /// What each version knows: `restart_after_crash` all, the others from the version that brought them.
    #[test]
    fn a_server_is_told_what_its_version_knows() {
        let told = |spec: &InstantSpec, is_recovering| {
            let settings = settings(spec, Path::new("/srv/data"), is_recovering);
            settings.into_iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>()
        };
        let always = "restart_after_crash=off";
        let (sync, prefetch) = ("recovery_init_sync_method=syncfs", "recovery_prefetch=off");
        let io = "io_method=worker";
        for (major, recovering, over) in [
            (13, &[always][..], &[always][..]),
            (14, &[always, sync], &[always, sync]),
            (15, &[always, sync, prefetch], &[always, sync]),
            (16, &[always, sync, prefetch], &[always, sync]),
            (17, &[always, sync, prefetch], &[always, sync]),
            (18, &[always, sync, prefetch, io], &[always, sync, io]),
        ] {
            assert_eq!(told(&spec(major), true), recovering, "{major}");
            assert_eq!(told(&spec(major), false), over, "{major}");
        }
        // Then replay needs what the pages held before.
        let without = InstantSpec { full_page_writes: false, ..spec(15) };
        assert_eq!(told(&without, true), [always, sync]);
        let elsewhere = InstantSpec { config_file: Some("/etc/it/postgresql.conf".into()), ..spec(13) };
        let named = ["config_file=/etc/it/postgresql.conf", "data_directory=/srv/data", always];
        assert_eq!(told(&elsewhere, true), named);
    }

    #[test]
    fn the_settings_of_a_command_line_are_those_that_it_sets() {
        let arguments = ["-D", "/srv/a=b", "-c", "restart_after_crash=off", "-c", "config_file=/etc/x=y/c"];
        let launch = Launch {
            program: "postgres".into(),
            arguments: arguments.map(Into::into).to_vec(),
            data_directory: "/srv/a=b".into(),
            pid_file: PathBuf::new(),
            owner: (1, 1),
            isolation: None,
            log_file: PathBuf::new(),
            environment: Vec::new(),
            supervisor: 1,
        };
        let found: Vec<_> = settings_of(&launch).into_iter().map(|set| (set.name, set.value)).collect();
        let wanted = [("restart_after_crash", "off"), ("config_file", "/etc/x=y/c")];
        assert_eq!(found, wanted.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert!(Running::default().settings().is_empty());
    }

    #[test]
    fn a_server_that_somebody_else_has_started_is_told_by_where_it_works() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().canonicalize().unwrap();
        let mut sleeper = Command::new("sleep").arg("60").current_dir(&data).spawn().unwrap();
        let file = PostmasterPid::parse(&format!("{}\n{}\n", sleeper.id(), data.display())).unwrap();
        let (mut running, owner) = (Running::default(), Owner::current());
        assert!(!running.look_for_others(None, &data, owner));
        assert!(!running.look_for_others(Some(&file), Path::new("/elsewhere"), owner));
        let other = Owner { uid: owner.uid + 1, ..owner };
        assert!(!running.look_for_others(Some(&file), &data, other), "somebody else stands there");
        assert!(!running.is_foreign());
        assert!(running.look_for_others(Some(&file), &data, owner), "it is new");
        assert!(running.is_foreign());
        assert!(!running.look_for_others(Some(&file), &data, owner), "it is known");
        assert_eq!(running.pid().unwrap().as_raw().unsigned_abs(), sleeper.id());
        assert!(
            !running.look_for_others(None, &data, owner) && running.pid().is_some(),
            "it still works there"
        );
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert!(!running.look_for_others(Some(&file), &data, owner) && running.pid().is_none());
    }
}
