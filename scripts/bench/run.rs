//! Runs a command and says what it took, as one line of JSON at the end of a file.
//!
//!   bench-run FILE COMMAND [ARGUMENT...]
//!   bench-run --each FILE COMMAND [ARGUMENT...]
//!
//! `seconds` by the clock, `cpu_seconds` (user and system) of the command and all the children it has waited for,
//! `peak_rss_bytes`: the largest sum of the resident memory of the command and its descendants, looked at fifty times
//! a second; `disk_read_bytes`: what they had the kernel fetch from disks, read ahead or by name included, and
//! `file_read_bytes`, what their reads returned, from a cache or not. The status is the command's.
//!
//! With `--each` the command is run for each line of standard input, which is its last argument, one after the other, and
//! each has a line with `ms`, from its start until it has ended. The first one that fails is the last, with its status.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const LOOK_EVERY: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).peekable();
    let each = arguments.next_if(|argument| argument == "--each").is_some();
    let (Some(file), Some(program)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: bench-run [--each] FILE COMMAND [ARGUMENT...]");
        return ExitCode::from(2);
    };
    let arguments: Vec<OsString> = arguments.collect();
    let mut file = File::options().create(true).append(true).open(file).expect("FILE can be written");
    if each { run_each(&mut file, &program, &arguments) } else { run_once(&mut file, &program, &arguments) }
}

fn run_once(file: &mut File, program: &OsStr, arguments: &[OsString]) -> ExitCode {
    let started = Instant::now();
    let mut child = Command::new(program).args(arguments).spawn().expect("the command can be started");
    let mut peak = 0;
    let status = loop {
        if let Some(status) = child.try_wait().expect("the child is ours") {
            break status;
        }
        peak = peak.max(resident_bytes(child.id()));
        std::thread::sleep(LOOK_EVERY);
    };
    let seconds = started.elapsed().as_secs_f64();
    let cpu = cpu_of_children();
    let [from_disks, from_files] = read_by_children();
    let line = format!(
        "{{\"seconds\":{seconds:.3},\"cpu_seconds\":{cpu:.2},\"peak_rss_bytes\":{peak},\
         \"disk_read_bytes\":{from_disks},\"file_read_bytes\":{from_files}}}\n"
    );
    file.write_all(line.as_bytes()).expect("FILE can be written");
    code_of(status)
}

fn run_each(file: &mut File, program: &OsStr, arguments: &[OsString]) -> ExitCode {
    for last in std::io::stdin().lines() {
        let mut command = Command::new(program);
        command.args(arguments).arg(last.expect("standard input is text")).stdin(Stdio::null());
        let started = Instant::now();
        let status = command.status().expect("the command can be started");
        let ms = started.elapsed().as_secs_f64() * 1000.0;
        if !status.success() {
            return code_of(status);
        }
        writeln!(file, "{{\"ms\":{ms:.3}}}").expect("FILE can be written");
    }
    ExitCode::SUCCESS
}

fn code_of(status: ExitStatus) -> ExitCode {
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// User and system time of all children that were waited for, and theirs.
fn cpu_of_children() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat").expect("every process has one");
    // Behind the name, which may hold anything: state, and then 11 and more fields to these two.
    let (_, fields) = stat.rsplit_once(')').expect("the name stands in parentheses");
    let ticks: u64 =
        fields.split_whitespace().skip(13).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    ticks as f64 / TICKS_PER_SECOND
}

/// What was fetched from disks, and what reads returned, of all children that were waited for, and theirs.
///
/// The kernel adds a child's to its parent's when that has waited for it; this process itself has read some kilobytes.
fn read_by_children() -> [u64; 2] {
    let io = fs::read_to_string("/proc/self/io").expect("the kernel counts what its tasks read");
    ["read_bytes: ", "rchar: "].map(|name| {
        let value = io.lines().find_map(|line| line.strip_prefix(name)?.parse::<u64>().ok());
        value.expect("it counts both")
    })
}

/// Sums up a process and its descendants; what is gone by now counts nothing.
fn resident_bytes(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = resident.and_then(|text| text.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let children = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let below = children.map(|list| {
        list.split_whitespace().filter_map(|child| child.parse().ok()).map(resident_bytes).sum::<u64>()
    });
    kilobytes.unwrap_or(0) * 1024 + below.sum::<u64>()
}
