//! Numbers, times and tables as people read them.
//!
//! Sizes have binary units as in the configuration, times have their zone, columns are aligned: text to the left,
//! numbers to the right. Deliberately absent: colours and borders; the output of one command is often the
//! input of `grep`.

use std::fmt::Write;
use std::time::Duration;

use jiff::Timestamp;

use crate::config::LazyTimeZone;

/// How text shows what depends on the reader.
#[derive(Debug, Clone)]
pub struct TextStyle {
    /// The zone in which times are shown.
    pub time_zone: LazyTimeZone,
}

impl TextStyle {
    /// Shows a time with its zone, as PostgreSQL writes it: `2026-11-20 11:15:00+01:00`.
    pub fn time(&self, time: Timestamp) -> String {
        time.to_zoned(self.time_zone.get()).strftime("%Y-%m-%d %H:%M:%S%:z").to_string()
    }
}

/// Shows a number of bytes: `17 B`, `1.5 MiB`, `230 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be shown as 1024.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// Shows a duration by its two largest units: `350 ms`, `4.2 s`, `3 min 20 s`, `26 h 5 min`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..60 => format!("{:.1} s", (duration.as_millis() / 100) as f64 / 10.0),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// How a column of a table is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table with aligned columns and a line of titles, unless no column has one.
#[derive(Debug, Clone)]
pub struct TextTable {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl TextTable {
    /// Creates a table with these columns and no rows.
    pub fn new(columns: &[(&'static str, Align)]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; cells beyond the columns are dropped and missing ones are empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut row: Vec<String> = cells.into_iter().take(self.columns.len()).collect();
        row.resize(self.columns.len(), String::new());
        self.rows.push(row);
    }

    /// Returns whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Appends the table to `out`.
    pub fn write(&self, out: &mut String) {
        let titles: Vec<String> = self.columns.iter().map(|(title, _)| (*title).to_owned()).collect();
        let lines = || std::iter::once(&titles).chain(&self.rows);
        let width = |column: usize| lines().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let untitled = usize::from(titles.iter().all(String::is_empty));
        for line in lines().skip(untitled) {
            let start = out.len();
            for (cell, ((_, align), width)) in line.iter().zip(self.columns.iter().zip(&widths)) {
                let gap = if out.len() == start { "" } else { "  " };
                // Writing to a String does not fail.
                let _ = match align {
                    Align::Left => write!(out, "{gap}{cell:<width$}"),
                    Align::Right => write!(out, "{gap}{cell:>width$}"),
                };
            }
            out.truncate(out.trim_end_matches(' ').len());
            out.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use super::*;

    #[test]
    fn sizes_have_three_digits_and_a_unit() {
        for (bytes, shown) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (10_239, "10.0 KiB"),
            (1_048_575, "1.00 MiB"),
            (1_048_576, "1.00 MiB"),
            (16 << 20, "16.0 MiB"),
            (230 << 30, "230 GiB"),
            (1023 << 30, "1.00 TiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(size(bytes), shown, "{bytes}");
        }
    }

    #[test]
    fn durations_have_their_two_largest_units() {
        for (millis, shown) in [
            (0, "0 ms"),
            (999, "999 ms"),
            (4_290, "4.2 s"),
            (59_999, "59.9 s"),
            (200_000, "3 min 20 s"),
            (93_900_000, "26 h 5 min"),
        ] {
            assert_eq!(duration(Duration::from_millis(millis)), shown);
        }
    }

    #[test]
    fn times_have_their_zone() {
        let time: Timestamp = "2026-07-01T10:15:00Z".parse().unwrap();
        let style = |time_zone: TimeZone| TextStyle { time_zone: time_zone.into() };
        assert_eq!(style(TimeZone::UTC).time(time), "2026-07-01 10:15:00+00:00");
        let east = TimeZone::fixed(jiff::tz::offset(2));
        assert_eq!(style(east).time(time), "2026-07-01 12:15:00+02:00");
    }

    #[test]
    fn a_table_without_titles_has_no_line_of_titles() {
        let mut table = TextTable::new(&[("", Align::Left), ("", Align::Left)]);
        table.row(["a".into(), "b".into()]);
        let mut out = String::new();
        table.write(&mut out);
        assert_eq!(out, "a  b\n");
    }

    #[test]
    fn columns_are_aligned_and_lines_end_with_text() {
        let mut table =
            TextTable::new(&[("ID", Align::Left), ("SIZE", Align::Right), ("LABEL", Align::Left)]);
        assert!(table.is_empty());
        table.row(["a".into(), "1.00 KiB".into(), "nächtlich".into()]);
        table.row(["longer".into(), "17 B".into()]);
        let mut out = String::new();
        table.write(&mut out);
        assert_eq!(out, "ID          SIZE  LABEL\na       1.00 KiB  nächtlich\nlonger      17 B\n");
    }
}
