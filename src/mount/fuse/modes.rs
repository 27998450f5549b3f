//! Which open file is used how: the kernel's rules for mixing modes on one inode, kept for it.
//!
//! While a file is open passed through, every other open of it has to be, by the same backing id, or the kernel fails
//! it with `EIO`; direct and then passed through is allowed (`tests/mount/kernel_modes.rs`). So an inode's id is kept
//! until the last of its handles is closed, in whichever mode that is, and an open that finds one is passed through.
//! That is safe because an id is only made for a file of which nothing has to be fetched, and such a file stays so
//! while it is open.
//!
//! What counts is the order in which the kernel comes to our answers, not the one in which we give them: an open that
//! was answered *direct* a moment ago may come to it after one that is answered *passed through* now. So the first of
//! these waits for a sign that the kernel has seen the others: any request with their handles, or [`SETTLE`]. Until
//! then opens stay direct; nobody is kept waiting.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::mount::fs::IoMode;
use crate::mount::tree::{HandleId, Ino};

/// How long the kernel may take to act on the answer to an open: as long as the process that asked may have to wait for
/// a processor, or for memory, on a host that has too little of both. Being too early is an error for that process; being
/// late keeps a file direct that somebody opened and has not used since.
const SETTLE: Duration = Duration::from_secs(30);

/// How an open is to be answered; `B` is the kernel's id of a backing file.
#[derive(Debug)]
pub(super) enum Granted<B> {
    Plain(IoMode),
    Passthrough(Arc<B>),
}

/// What is open, and how.
#[derive(Debug)]
pub(super) struct Modes<B> {
    state: Mutex<State<B>>,
}

#[derive(Debug)]
struct State<B> {
    support: Support,
    inodes: HashMap<Ino, OpenInode<B>>,
    handles: HashMap<HandleId, OpenHandle>,
}

#[derive(Debug)]
struct OpenInode<B> {
    handles: u32,
    /// The one id of all handles that are passed through.
    backing: Option<Arc<B>>,
    /// Handles answered *direct* that the kernel has not used yet, and when that was.
    unsettled: Vec<(HandleId, Instant)>,
}

#[derive(Debug, Clone, Copy)]
struct OpenHandle {
    ino: Ino,
    is_passthrough: bool,
    is_settled: bool,
}

/// Whether files can be passed through on this mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Support {
    Likely,
    Missing { reason: &'static str, is_told: bool },
}

impl<B> Modes<B> {
    /// Creates the table of a mount on which nothing is open.
    pub(super) fn new() -> Self {
        let state = State { support: Support::Likely, inodes: HashMap::new(), handles: HashMap::new() };
        Self { state: Mutex::new(state) }
    }

    /// Notes that files cannot be passed through; told once, when somebody would need it.
    pub(super) fn lacks(&self, reason: &'static str) {
        self.lock().support = Support::Missing { reason, is_told: false };
    }

    /// Decides how an open is answered that the tree would have in `mode`; `make` gives the file to the kernel.
    pub(super) fn open(
        &self,
        ino: Ino,
        handle: HandleId,
        mode: IoMode,
        now: Instant,
        make: impl FnOnce() -> io::Result<B>,
    ) -> Granted<B> {
        if mode == IoMode::Cached {
            // Only on volumes that cannot change, where nothing is passed through.
            return Granted::Plain(mode);
        }
        let mut state = self.lock();
        let State { support, inodes, handles } = &mut *state;
        let inode = inodes.entry(ino).or_insert_with(OpenInode::new);
        inode.handles += 1;
        inode.unsettled.retain(|(_, since)| now.saturating_duration_since(*since) < SETTLE);
        let is_first = mode == IoMode::Passthrough && inode.backing.is_none() && inode.unsettled.is_empty();
        if is_first && support.is_likely() {
            // Under the lock, because an inode must not get two ids; the call does not wait.
            match make() {
                Ok(id) => inode.backing = Some(Arc::new(id)),
                Err(error) => support.judge(&error),
            }
        }
        let granted = match &inode.backing {
            Some(id) => Granted::Passthrough(id.clone()),
            None => {
                inode.unsettled.push((handle, now));
                Granted::Plain(IoMode::Direct)
            }
        };
        let is_passthrough = inode.backing.is_some();
        handles.insert(handle, OpenHandle { ino, is_passthrough, is_settled: is_passthrough });
        granted
    }

    /// Notes that the kernel has used a handle, and tells whether it is passed through.
    pub(super) fn used(&self, handle: HandleId) -> bool {
        let mut state = self.lock();
        let State { inodes, handles, .. } = &mut *state;
        let Some(open) = handles.get_mut(&handle) else { return false };
        if !open.is_settled {
            open.is_settled = true;
            if let Some(inode) = inodes.get_mut(&open.ino) {
                inode.unsettled.retain(|(unsettled, _)| *unsettled != handle);
            }
        }
        open.is_passthrough
    }

    /// Forgets a closed handle, and with the last one of its inode the id.
    pub(super) fn release(&self, handle: HandleId) {
        // Dropped outside the lock: giving an id back is a system call.
        let closed = self.lock().take(handle);
        drop(closed);
    }

    fn lock(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().expect("no holder of this lock panics")
    }
}

impl<B> State<B> {
    fn take(&mut self, handle: HandleId) -> Option<OpenInode<B>> {
        let open = self.handles.remove(&handle)?;
        let inode = self.inodes.get_mut(&open.ino)?;
        inode.unsettled.retain(|(unsettled, _)| *unsettled != handle);
        inode.handles -= 1;
        if inode.handles == 0 { self.inodes.remove(&open.ino) } else { None }
    }
}

impl<B> OpenInode<B> {
    fn new() -> Self {
        Self { handles: 0, backing: None, unsettled: Vec::new() }
    }
}

impl Support {
    /// Tells whether it is worth trying, and says once why not.
    fn is_likely(&mut self) -> bool {
        match self {
            Self::Likely => true,
            Self::Missing { reason, is_told } => {
                if !std::mem::replace(is_told, true) {
                    tell(reason);
                }
                false
            }
        }
    }

    /// Learns from a backing file that the kernel did not take.
    fn judge(&mut self, error: &io::Error) {
        match lacking(error) {
            Some(reason) => {
                tell(reason);
                *self = Self::Missing { reason, is_told: true };
            }
            None => tracing::warn!("could not pass a file through, so it is read and written here: {error}"),
        }
    }
}

fn tell(reason: &str) {
    tracing::info!("files that are wholly local are not passed through: {reason}");
}

/// Returns what is missing on this mount for good, or `None` where the next file may fare better.
fn lacking(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error()? {
        libc::EPERM => Some("that takes CAP_SYS_ADMIN"),
        libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY => Some(OLD_KERNEL),
        libc::ELOOP => Some("the local directory is on a file system that stands on another"),
        _ => None,
    }
}

/// What is missing where the kernel does not offer it.
pub(super) const OLD_KERNEL: &str = "this kernel cannot; Linux can from 6.9, with CONFIG_FUSE_PASSTHROUGH";

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Weak;

    use IoMode::{Cached, Direct, Passthrough};

    use super::*;

    const A: Ino = Ino(7);
    const B: Ino = Ino(8);

    /// A table, and what the kernel was asked for.
    struct Bench {
        modes: Modes<u32>,
        now: Cell<Instant>,
        next: Cell<u64>,
        made: Cell<u32>,
    }

    impl Bench {
        fn new() -> Self {
            let now = Cell::new(Instant::now());
            Self { modes: Modes::new(), now, next: Cell::new(1), made: Cell::new(0) }
        }

        fn open_with(
            &self,
            ino: Ino,
            mode: IoMode,
            make: impl FnOnce() -> io::Result<u32>,
        ) -> (HandleId, Granted<u32>) {
            let handle = HandleId(self.next.replace(self.next.get() + 1));
            (handle, self.modes.open(ino, handle, mode, self.now.get(), make))
        }

        fn open(&self, ino: Ino, mode: IoMode) -> (HandleId, Granted<u32>) {
            self.open_with(ino, mode, || {
                self.made.set(self.made.get() + 1);
                Ok(self.made.get())
            })
        }

        fn refused(&self, ino: Ino, number: i32) -> Granted<u32> {
            self.open_with(ino, Passthrough, || Err(io::Error::from_raw_os_error(number))).1
        }

        fn wait(&self, time: Duration) {
            self.now.set(self.now.get() + time);
        }

        fn is_empty(&self) -> bool {
            let state = self.modes.lock();
            state.inodes.is_empty() && state.handles.is_empty()
        }
    }

    fn id(granted: &Granted<u32>) -> Option<u32> {
        match granted {
            Granted::Passthrough(id) => Some(**id),
            Granted::Plain(Direct) => None,
            Granted::Plain(other) => panic!("{other:?} on a volume that can change"),
        }
    }

    #[test]
    fn one_id_an_inode_until_its_last_handle_is_closed() {
        let bench = Bench::new();
        let (first, granted) = bench.open(A, Passthrough);
        assert_eq!(id(&granted), Some(1));
        let (second, granted) = bench.open(A, Passthrough);
        assert_eq!(id(&granted), Some(1));
        assert_eq!(id(&bench.open(B, Passthrough).1), Some(2));
        bench.modes.release(first);
        let (third, granted) = bench.open(A, Passthrough);
        assert_eq!(id(&granted), Some(1));
        bench.modes.release(second);
        bench.modes.release(third);
        assert_eq!(id(&bench.open(A, Passthrough).1), Some(3));
    }

    #[test]
    fn the_id_goes_back_to_the_kernel_with_the_last_handle() {
        let modes: Modes<u32> = Modes::new();
        let now = Bench::new().now.get();
        let mut seen: Vec<Weak<u32>> = Vec::new();
        for handle in [1, 2] {
            let Granted::Passthrough(id) = modes.open(A, HandleId(handle), Passthrough, now, || Ok(5)) else {
                panic!("not passed through");
            };
            seen.push(Arc::downgrade(&id));
        }
        modes.release(HandleId(1));
        assert!(seen.iter().all(|id| id.upgrade().is_some()));
        modes.release(HandleId(2));
        assert!(seen.iter().all(|id| id.upgrade().is_none()));
        modes.release(HandleId(2));
    }

    /// The kernel would fail it with `EIO`, and what has an id is wholly local.
    #[test]
    fn once_passed_through_every_open_is() {
        let bench = Bench::new();
        bench.open(A, Passthrough);
        let (late, granted) = bench.open(A, Direct);
        assert_eq!(id(&granted), Some(1));
        assert!(bench.modes.used(late));
        assert_eq!(bench.made.get(), 1);
    }

    /// A parallel write through the direct handle keeps the old backing file with the inode in the kernel.
    #[test]
    fn a_direct_handle_keeps_the_id_too() {
        let bench = Bench::new();
        let (direct, _) = bench.open(A, Direct);
        bench.modes.used(direct);
        let (passed, granted) = bench.open(A, Passthrough);
        assert_eq!(id(&granted), Some(1));
        bench.modes.release(passed);
        assert_eq!(id(&bench.open(A, Passthrough).1), Some(1));
        assert!(!bench.modes.used(direct), "a handle stays what it was");
    }

    #[test]
    fn passing_through_waits_until_the_kernel_has_seen_the_direct_answers() {
        let bench = Bench::new();
        let (one, _) = bench.open(A, Direct);
        let (two, granted) = bench.open(A, Passthrough);
        assert_eq!(id(&granted), None);
        bench.modes.used(one);
        assert_eq!(id(&bench.open(B, Passthrough).1), Some(1), "another inode has nothing to do with it");
        let (three, granted) = bench.open(A, Passthrough);
        assert_eq!(id(&granted), None, "the second may still be on its way");
        bench.modes.used(two);
        bench.modes.release(three);
        assert_eq!(id(&bench.open(A, Passthrough).1), Some(2));
    }

    #[test]
    fn a_direct_handle_that_is_never_used_does_not_stand_in_the_way_for_ever() {
        let bench = Bench::new();
        let (idle, _) = bench.open(A, Direct);
        bench.wait(SETTLE - Duration::from_millis(1));
        assert_eq!(id(&bench.open(B, Passthrough).1), Some(1));
        let (late, granted) = bench.open(A, Passthrough);
        assert_eq!(id(&granted), None);
        bench.modes.release(late);
        bench.wait(Duration::from_millis(1));
        assert_eq!(id(&bench.open(A, Passthrough).1), Some(2));
        bench.modes.used(idle);
        bench.modes.release(idle);
    }

    #[test]
    fn where_it_is_missing_everything_stays_direct_and_nobody_asks_again() {
        for number in [libc::EPERM, libc::EOPNOTSUPP, libc::ENOSYS, libc::ENOTTY, libc::ELOOP] {
            let bench = Bench::new();
            assert_eq!(id(&bench.refused(A, number)), None);
            bench.wait(SETTLE);
            assert_eq!(id(&bench.open(A, Passthrough).1), None);
            assert_eq!(id(&bench.open(B, Passthrough).1), None);
            assert_eq!(bench.made.get(), 0, "{number}");
        }
        let bench = Bench::new();
        bench.modes.lacks(OLD_KERNEL);
        assert_eq!(id(&bench.open(A, Passthrough).1), None);
        assert_eq!(bench.made.get(), 0);
        let told = Support::Missing { reason: OLD_KERNEL, is_told: true };
        assert_eq!(bench.modes.lock().support, told);
    }

    #[test]
    fn a_file_that_could_not_be_handed_over_says_nothing_about_the_next() {
        let bench = Bench::new();
        assert_eq!(id(&bench.refused(A, libc::ENOMEM)), None);
        assert_eq!(id(&bench.open(B, Passthrough).1), Some(1));
        bench.wait(SETTLE);
        assert_eq!(id(&bench.open(A, Passthrough).1), Some(2));
    }

    #[test]
    fn what_cannot_change_is_cached_and_not_kept_track_of() {
        let bench = Bench::new();
        let (handle, granted) = bench.open(A, Cached);
        assert!(matches!(granted, Granted::Plain(Cached)));
        assert!(!bench.modes.used(handle));
        assert!(bench.is_empty());
        bench.modes.release(handle);
    }

    #[test]
    fn nothing_is_left_of_what_was_closed() {
        let bench = Bench::new();
        let modes = [Direct, Passthrough, Direct, Passthrough];
        let handles: Vec<HandleId> = modes.iter().map(|mode| bench.open(A, *mode).0).collect();
        for handle in handles {
            bench.modes.release(handle);
        }
        assert!(bench.is_empty());
    }
}
