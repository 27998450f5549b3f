//! The priority of a command beside the server whose host it shares.
//!
//! A backup uses every processor it finds idle, and has more time than whoever waits for a query: so it steps back
//! where both want the same one. Threads inherit it, so it is set before there are any.

/// A third of the weight of a server process: it costs queries less than a backup of another program would, and is
/// still far from starving on a host that is always busy.
const NICENESS: libc::c_int = 5;

/// Lets others go first from now on, in this thread and those it starts.
#[expect(unsafe_code, reason = "a system call that nix does not have; it takes numbers and no memory")]
pub(super) fn yield_to_others() {
    // SAFETY: no memory is handed over; 0 is the calling thread.
    let outcome = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
    if outcome != 0 {
        // A caller that is nicer already may not come back.
        tracing::debug!("the priority stays as it is: {}", std::io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_started_afterwards_are_as_nice() {
        let niceness = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            let (_, fields) = stat.rsplit_once(')').unwrap();
            fields.split_whitespace().nth(16).unwrap().parse::<i32>().unwrap()
        };
        let before = niceness();
        let nicer = std::thread::spawn(move || {
            yield_to_others();
            std::thread::spawn(niceness).join().unwrap()
        });
        assert_eq!(nicer.join().unwrap(), NICENESS.max(before));
        assert_eq!(niceness(), before);
    }
}
