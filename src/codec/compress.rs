//! Compression of single bodies: zstd, snappy, lz4 or none, with contexts kept between calls.
//!
//! A body that does not get smaller is stored as `none`, so the codec is recorded with every frame. Inflating is
//! bounded: the caller says how long the raw bytes are, and a body that would give one byte more or less is
//! damaged. What zstd and snappy claim in their own headers is compared before anything is allocated.
//! Deliberately absent: streams and dictionaries (measured, not worth their format), and multi-threaded zstd.

use std::cell::RefCell;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

/// How a body is compressed, as recorded in a frame; a closed list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum CodecId {
    None = 0,
    Zstd = 1,
    Snappy = 2,
    Lz4 = 3,
}

impl CodecId {
    /// Returns the name used in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zstd => "zstd",
            Self::Snappy => "snappy",
            Self::Lz4 => "lz4",
        }
    }
}

impl TryFrom<u8> for CodecId {
    type Error = Error;

    fn try_from(byte: u8) -> Result<Self> {
        match byte {
            0 => Ok(Self::None),
            1 => Ok(Self::Zstd),
            2 => Ok(Self::Snappy),
            3 => Ok(Self::Lz4),
            other => Err(Error::UnknownCodec(other)),
        }
    }
}

impl fmt::Display for CodecId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An algorithm and how hard it tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compression {
    pub algorithm: CodecId,
    /// Used by zstd alone, 1 to 19; the others have one level, 0.
    #[serde(default)]
    pub level: i32,
}

impl Compression {
    /// The level for what is read at random: 2.5 % smaller than level 1 on real rows, four times as fast as 6.
    pub const ZSTD_LEVEL_DEFAULT: i32 = 3;
    /// The level for WAL, on which level 3 gains nothing.
    pub const ZSTD_LEVEL_WAL: i32 = 1;
    /// Above it zstd needs windows that every reader would have to hold.
    pub const ZSTD_LEVEL_MAX: i32 = 19;

    /// Stores bytes as they are.
    pub const NONE: Self = Self { algorithm: CodecId::None, level: 0 };

    /// Compresses with zstd at `level`.
    pub const fn zstd(level: i32) -> Self {
        Self { algorithm: CodecId::Zstd, level }
    }

    /// Refuses a level that the algorithm does not have.
    pub fn validate(&self) -> Result<()> {
        let (min, max) = match self.algorithm {
            CodecId::Zstd => (1, Self::ZSTD_LEVEL_MAX),
            CodecId::None | CodecId::Snappy | CodecId::Lz4 => (0, 0),
        };
        if (min..=max).contains(&self.level) {
            return Ok(());
        }
        Err(Error::Level { codec: self.algorithm.name(), level: self.level, min, max })
    }
}

impl Default for Compression {
    fn default() -> Self {
        Self::zstd(Self::ZSTD_LEVEL_DEFAULT)
    }
}

/// Compresses one body after the other, keeping its context (about 1.3 MB for zstd 3) between them.
pub struct Compressor {
    compression: Compression,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    snappy: snap::raw::Encoder,
}

impl Compressor {
    /// Creates a compressor; its context is allocated by the first body.
    pub fn new(compression: Compression) -> Self {
        Self { compression, zstd: None, snappy: snap::raw::Encoder::new() }
    }

    /// Lends this thread's own compressor to `work`: what a job on the CPU pool uses.
    ///
    /// A thread keeps one; a job that asks for another compression replaces it.
    pub fn on_this_thread<T>(compression: Compression, work: impl FnOnce(&mut Compressor) -> T) -> T {
        thread_local! {
            static LOCAL: RefCell<Option<Compressor>> = const { RefCell::new(None) };
        }
        LOCAL.with_borrow_mut(|local| match local {
            Some(compressor) if compressor.compression == compression => work(compressor),
            _ => work(local.insert(Compressor::new(compression))),
        })
    }

    /// Compresses `raw`; gives it back as `CodecId::None` where that is no longer.
    pub fn compress(&mut self, raw: &[u8]) -> Result<(CodecId, Vec<u8>)> {
        let codec = self.compression.algorithm;
        let stored = match codec {
            CodecId::None => return Ok((CodecId::None, raw.to_vec())),
            CodecId::Zstd => self.compress_zstd(raw),
            CodecId::Snappy => self.snappy.compress_vec(raw).map_err(|e| e.to_string()),
            CodecId::Lz4 => Ok(lz4_flex::block::compress(raw)),
        }
        .map_err(|reason| Error::NotCompressed { codec: codec.name(), raw_len: raw.len(), reason })?;
        if stored.len() < raw.len() { Ok((codec, stored)) } else { Ok((CodecId::None, raw.to_vec())) }
    }

    fn compress_zstd(&mut self, raw: &[u8]) -> Result<Vec<u8>, String> {
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            empty => {
                let fresh = zstd::bulk::Compressor::new(self.compression.level).map_err(|e| e.to_string())?;
                empty.insert(fresh)
            }
        };
        zstd.compress(raw).map_err(|e| e.to_string())
    }
}

/// Inflates one body after the other, keeping its context between them.
pub struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    snappy: snap::raw::Decoder,
}

impl Decompressor {
    /// Creates a decompressor; its context is allocated by the first body.
    pub fn new() -> Self {
        Self { zstd: None, snappy: snap::raw::Decoder::new() }
    }

    /// Lends this thread's own decompressor to `work`: what a job on the CPU pool uses.
    pub fn on_this_thread<T>(work: impl FnOnce(&mut Decompressor) -> T) -> T {
        thread_local! {
            static LOCAL: RefCell<Decompressor> = RefCell::new(Decompressor::new());
        }
        LOCAL.with_borrow_mut(work)
    }

    /// Inflates `stored` to exactly `raw_len` bytes.
    ///
    /// Allocates `raw_len` bytes and no more, so the caller holds it against a limit first. Anything that would
    /// inflate to another length, or has bytes left over, is `Error::Damaged`.
    pub fn decompress(&mut self, codec: CodecId, stored: &[u8], raw_len: usize) -> Result<Vec<u8>> {
        let raw = match codec {
            CodecId::None if stored.len() == raw_len => Ok(stored.to_vec()),
            CodecId::None => Err("the length differs".to_owned()),
            CodecId::Zstd => self.decompress_zstd(stored, raw_len),
            CodecId::Snappy => self.decompress_snappy(stored, raw_len),
            CodecId::Lz4 => decompress_lz4(stored, raw_len),
        };
        raw.map_err(|reason| Error::Damaged { codec: codec.name(), stored_len: stored.len(), raw_len, reason })
    }

    fn decompress_zstd(&mut self, stored: &[u8], raw_len: usize) -> Result<Vec<u8>, String> {
        match zstd::zstd_safe::get_frame_content_size(stored) {
            Ok(Some(claimed)) if claimed == raw_len as u64 => {}
            Ok(Some(claimed)) => return Err(format!("its header says {claimed} bytes")),
            Ok(None) | Err(_) => return Err("its header is not one that Walden writes".to_owned()),
        }
        // A second frame behind the first would be inflated too; one body is one frame.
        match zstd::zstd_safe::find_frame_compressed_size(stored) {
            Ok(len) if len == stored.len() => {}
            _ => return Err("it is not one whole frame".to_owned()),
        }
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            empty => empty.insert(zstd::bulk::Decompressor::new().map_err(|e| e.to_string())?),
        };
        let mut raw = Vec::with_capacity(raw_len);
        zstd.decompress_to_buffer(stored, &mut raw).map_err(|e| e.to_string())?;
        exactly(raw, raw_len)
    }

    fn decompress_snappy(&mut self, stored: &[u8], raw_len: usize) -> Result<Vec<u8>, String> {
        match snap::raw::decompress_len(stored) {
            Ok(claimed) if claimed == raw_len => {}
            Ok(claimed) => return Err(format!("its header says {claimed} bytes")),
            Err(error) => return Err(error.to_string()),
        }
        let mut raw = vec![0; raw_len];
        let len = self.snappy.decompress(stored, &mut raw).map_err(|e| e.to_string())?;
        raw.truncate(len);
        exactly(raw, raw_len)
    }
}

impl Default for Decompressor {
    fn default() -> Self {
        Self::new()
    }
}

fn decompress_lz4(stored: &[u8], raw_len: usize) -> Result<Vec<u8>, String> {
    let mut raw = vec![0; raw_len];
    let len = lz4_flex::block::decompress_into(stored, &mut raw).map_err(|e| e.to_string())?;
    raw.truncate(len);
    exactly(raw, raw_len)
}

fn exactly(raw: Vec<u8>, raw_len: usize) -> Result<Vec<u8>, String> {
    if raw.len() == raw_len { Ok(raw) } else { Err(format!("it gave {} bytes", raw.len())) }
}
