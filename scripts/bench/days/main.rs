//! What a month of basebackups comes to, and whether each of them is what the server had: what scripts/bench/backup
//! cannot do by itself.
//!
//!   bench-days record DATA_DIRECTORY RECORD           writes a hash of every page of the cluster down
//!   bench-days changed BEFORE AFTER                   says how many pages differ between two records
//!   bench-days compare BEFORE AFTER DATA_DIRECTORY    compares a restored directory with two records
//!   bench-days keep CONFIGURATION COUNT               removes all but the newest basebackups from the repository
//!   bench-days scan CONFIGURATION BASEBACKUP          reads all relations of a basebackup from end to end
//!
//! Each but the first prints a line of JSON. Nothing of it is Walden's own account: pages are hashed from the files of the
//! server and from those of a restore, and bytes are counted by listing the store and at its edge.

mod month;
mod pages;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde_json::json;

use crate::month::Month;
use crate::pages::PageRecord;

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["record", directory, record] => PageRecord::take(Path::new(directory))?.write(Path::new(record))?,
        ["changed", before, after] => {
            let (before, after) = (read(before)?, read(after)?);
            println!("{}", json!(after.since(&before)));
        }
        ["compare", before, after, directory] => {
            let restored = PageRecord::take(Path::new(directory))?;
            let comparison = restored.compared(&read(before)?, &read(after)?);
            println!("{}", json!(comparison));
            if !comparison.is_exact() {
                return Ok(ExitCode::FAILURE);
            }
        }
        ["keep", configuration, count] => {
            let count = count.parse().context("COUNT is a number")?;
            println!("{}", Month::open(Path::new(configuration)).await?.keep(count).await?);
        }
        ["scan", configuration, basebackup] => {
            println!("{}", Month::open(Path::new(configuration)).await?.scan(basebackup).await?);
        }
        _ => bail!("usage: bench-days record|changed|compare|keep|scan …"),
    }
    Ok(ExitCode::SUCCESS)
}

fn read(record: &str) -> anyhow::Result<PageRecord> {
    PageRecord::read(Path::new(record)).with_context(|| format!("cannot read the record \"{record}\""))
}
