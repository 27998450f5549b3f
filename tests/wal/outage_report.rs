//! What `scripts/bench/wal-outage` and `scripts/bench/wal-majors` want to know of tests that they run: a line each.

use std::env;
use std::fs::File;
use std::io::Write;

use serde_json::Value;

/// Writes a line of the report that a script asked for.
pub fn report(line: &Value) {
    let Ok(path) = env::var("WALDEN_WAL_REPORT") else { return };
    writeln!(File::options().append(true).create(true).open(path).unwrap(), "{line}").unwrap();
}
