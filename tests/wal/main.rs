//! WAL out of real servers and back into them, and the mount: nothing that can fail looks like the end of the archive.

#[path = "../support/mod.rs"]
mod support;

mod scene;

mod archiving;
mod arrival;
mod check;
mod forced;
mod leaving;
mod linked;
mod majors;
mod mount;
mod never_promotes;
mod outage;
mod outage_report;
mod prefetch;
mod receive;
mod receive_damage;
mod receive_ending;
mod receive_hosts;
mod receive_recovery;
mod receive_resume;
mod receive_rights;
mod receive_rounds;
mod receive_scene;
mod receive_servers;
mod receive_timelines;
mod receive_told;
mod receive_trouble;
mod recovery;
mod segment_sizes;
mod statuses;
