//! `tablespace_map`: where the links in `pg_tblspc` lead on the server a backup was taken from.
//!
//! One line for each tablespace, OID and path; a newline, carriage return or backslash in the path has a backslash in
//! front. A server that finds the file makes the links again, wherever they lead: a clone on the source's own host
//! would write into the source's tablespaces (failure 27b). So Walden reads it and never hands it on.

use super::oid::Oid;

/// A tablespace and its path on the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceLink {
    pub tablespace: Oid,
    /// An absolute path, or for a tablespace inside PGDATA (15 and later) a relative one; bytes as the server has them.
    pub location: Vec<u8>,
}

/// Why bytes are not a tablespace map; lines are counted from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TablespaceMapError {
    #[error("tablespace_map, line {line}: expected an OID and a path")]
    Line { line: usize },
    #[error("tablespace_map ends within a line")]
    Unfinished,
    #[error("tablespace_map names tablespace {tablespace} twice")]
    Twice { tablespace: Oid },
}

/// Reads a map, as the server's `read_tablespace_map` does.
pub fn parse_tablespace_map(bytes: &[u8]) -> Result<Vec<TablespaceLink>, TablespaceMapError> {
    let mut links: Vec<TablespaceLink> = Vec::new();
    let mut line = Vec::new();
    let mut lines = 1;
    let mut escaped = false;
    for byte in bytes.iter().copied() {
        match byte {
            b'\n' | b'\r' if !escaped => {
                if !line.is_empty() {
                    let link = parse_line(&line).ok_or(TablespaceMapError::Line { line: lines })?;
                    if links.iter().any(|known| known.tablespace == link.tablespace) {
                        return Err(TablespaceMapError::Twice { tablespace: link.tablespace });
                    }
                    links.push(link);
                    line.clear();
                }
                lines += 1;
            }
            b'\\' if !escaped => escaped = true,
            _ => {
                line.push(byte);
                escaped = false;
            }
        }
    }
    if escaped || !line.is_empty() { Err(TablespaceMapError::Unfinished) } else { Ok(links) }
}

fn parse_line(line: &[u8]) -> Option<TablespaceLink> {
    let space = line.iter().position(|b| *b == b' ')?;
    let location = line[space + 1..].to_vec();
    let tablespace = Oid::from_name(&line[..space])?;
    (!location.is_empty() && !location.contains(&0)).then_some(TablespaceLink { tablespace, location })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn link(tablespace: u32, location: &[u8]) -> TablespaceLink {
        TablespaceLink { tablespace: Oid(tablespace), location: location.to_vec() }
    }

    /// As `pg_backup_start` writes it.
    fn write(links: &[TablespaceLink]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for TablespaceLink { tablespace, location } in links {
            bytes.extend_from_slice(format!("{tablespace} ").as_bytes());
            for byte in location.iter().copied() {
                bytes.extend_from_slice(if b"\n\r\\".contains(&byte) { b"\\" } else { b"" });
                bytes.push(byte);
            }
            bytes.push(b'\n');
        }
        bytes
    }

    #[test]
    fn a_map_of_the_server_is_read() {
        let map = b"16416 /srv/ts odd\\\\back\n16415 /srv/ts2\n\n16401 /srv/a\\\nb\n";
        let expected =
            [link(16416, b"/srv/ts odd\\back"), link(16415, b"/srv/ts2"), link(16401, b"/srv/a\nb")];
        assert_eq!(parse_tablespace_map(map), Ok(expected.to_vec()));
        assert_eq!(parse_tablespace_map(b""), Ok(Vec::new()));
    }

    #[test]
    fn what_the_server_refuses_is_refused() {
        let error = |map: &[u8]| parse_tablespace_map(map).unwrap_err();
        for map in [&b"16401\n"[..], b"16401 \n", b" /srv\n", b"x /srv\n", b"0 /srv\n", b"016401 /srv\n"] {
            assert_eq!(error(map), TablespaceMapError::Line { line: 1 }, "{map:?}");
        }
        assert_eq!(error(b"16401 /srv"), TablespaceMapError::Unfinished);
        assert_eq!(error(b"16401 /srv\\"), TablespaceMapError::Unfinished);
        assert_eq!(error(b"1 /a\n1 /b\n"), TablespaceMapError::Twice { tablespace: Oid(1) });
    }

    proptest! {
        #[test]
        fn what_the_server_writes_is_read_back(
            locations in prop::collection::btree_map(1u32.., prop::collection::vec(1u8.., 1..20), 0..5),
        ) {
            let links: Vec<_> = locations.iter().map(|(oid, location)| link(*oid, location)).collect();
            prop_assert_eq!(parse_tablespace_map(&write(&links)), Ok(links));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = parse_tablespace_map(&bytes);
        }
    }
}
