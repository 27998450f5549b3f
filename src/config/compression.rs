//! `[compression]`: what basebackups and WAL are compressed with.
//!
//! WAL has a level of its own, because level 3 gains nothing on it. The limits of a level are the codec's.

use crate::codec::{CodecId, Compression};

use super::error::Result;
use super::table::Table;

/// How data is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressionConfig {
    /// For basebackups.
    pub basebackup: Compression,
    /// For WAL.
    pub wal: Compression,
}

impl CompressionConfig {
    pub(super) fn read(table: &Table<'_>) -> Result<Self> {
        let algorithm = match table.text("algorithm").as_ref().map(|entry| entry.value.as_str()) {
            Some("snappy") => CodecId::Snappy,
            Some("lz4") => CodecId::Lz4,
            Some("none") => CodecId::None,
            _ => CodecId::Zstd,
        };
        Ok(Self {
            basebackup: level(table, "level", algorithm, Compression::ZSTD_LEVEL_DEFAULT)?,
            wal: level(table, "wal_level", algorithm, Compression::ZSTD_LEVEL_WAL)?,
        })
    }
}

impl Default for CompressionConfig {
    fn default() -> Self {
        Self { basebackup: Compression::default(), wal: Compression::zstd(Compression::ZSTD_LEVEL_WAL) }
    }
}

fn level(table: &Table<'_>, key: &str, algorithm: CodecId, zstd_default: i32) -> Result<Compression> {
    let default = if algorithm == CodecId::Zstd { zstd_default } else { 0 };
    let Some(entry) = table.integer(key)? else { return Ok(Compression { algorithm, level: default }) };
    let level = i32::try_from(entry.value).unwrap_or(i32::MAX);
    let compression = Compression { algorithm, level };
    match compression.validate() {
        Ok(()) => Ok(compression),
        Err(error) => Err(entry.bad(error.to_string(), error.hint())),
    }
}
