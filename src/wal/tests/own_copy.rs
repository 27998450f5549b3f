//! Segments that the archive lacks and the server has itself: an answer only as far as they go.

use super::{
    Error, Fetched, HeadWritten, Lsn, MIB, ObjectKey, Server, crc32c, head, name, plan_file, segment,
};

/// A segment without a record of its own: all of it lies within one that began before it and ends behind it.
fn within_a_record(timeline: u32, number: u64) -> Vec<u8> {
    let mut bytes = segment(timeline, number);
    let mut left = 2 * MIB as u32;
    for at in (0..MIB).step_by(8192) {
        let (header, flags): (u32, u16) = if at == 0 { (40, 3) } else { (24, 1) };
        let mut put = |offset: usize, value: &[u8]| {
            bytes[at + offset..at + offset + value.len()].copy_from_slice(value);
        };
        put(0, &0xD110u16.to_le_bytes());
        put(2, &flags.to_le_bytes());
        put(4, &timeline.to_le_bytes());
        put(8, &(number * MIB as u64 + at as u64).to_le_bytes());
        put(16, &left.to_le_bytes());
        put(20, &[0; 4]);
        left -= 8192 - header;
    }
    bytes
}

/// A segment with one record in it, which says that the server went on in the next one.
fn switched_at_once(timeline: u32, number: u64) -> Vec<u8> {
    let mut bytes = segment(timeline, number);
    bytes[40..].fill(0);
    let record = &mut bytes[40..64];
    record[0] = 24;
    record[16] = 0x40;
    let crc = crc32c(&record[..20]);
    record[20..24].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Segments as the last one stands in a copy of a running server: valid from the beginning, and no further than to some point.
fn that_end_early(timeline: u32, number: u64) -> [Vec<u8>; 3] {
    let mut half = within_a_record(timeline, number);
    half[MIB / 2..].fill(0);
    // Its file was that of another segment before, which shows behind the last page that was written.
    let mut recycled = within_a_record(timeline, number);
    recycled[MIB - 8192..].copy_from_slice(&within_a_record(timeline, number - 1)[MIB - 8192..]);
    [half, recycled, segment(timeline, number)]
}

impl Server {
    fn remove_segment(&self, number: u64) {
        let key = format!("main/clusters/{}/wal/00000001/00000000/{}", Self::cluster(), name(1, number));
        self.store.inner().tamper(&ObjectKey::parse(&key).unwrap(), |_| None);
    }
}

/// Failure 1: the server ended recovery at the end of its own segment, and promoted, with more in the archive.
#[tokio::test]
async fn a_copy_of_its_own_answers_for_a_hole_only_where_the_log_goes_on_behind_it() {
    let server = Server::new();
    server.push_segments(1, 2..=4).await;
    server.fetch(&name(1, 2)).await.unwrap();
    for number in [3, 4] {
        server.remove_segment(number);
        for whole in [within_a_record(1, number), switched_at_once(1, number)] {
            server.write_wal(&name(1, number), &whole);
            assert_eq!(server.fetch(&name(1, number)).await.unwrap(), Fetched::Absent, "{number}");
        }
        for early in that_end_early(1, number) {
            server.write_wal(&name(1, number), &early);
            let error = server.fetch(&name(1, number)).await.unwrap_err();
            assert!(matches!(error, Error::Missing { .. }), "{number}: {error}");
        }
        // A recycled file under that name.
        server.write_wal(&name(1, number), &within_a_record(1, 1));
        assert!(server.fetch(&name(1, number)).await.is_err(), "{number}");
    }
    // Behind the plan it is for the server to know.
    server.write_wal(&name(1, 5), &segment(1, 5));
    assert_eq!(server.fetch(&name(1, 5)).await.unwrap(), Fetched::Absent);
}

#[tokio::test]
async fn a_tail_that_was_cut_off_is_not_made_up_for_by_a_beginning_of_it() {
    let server = Server::new();
    server.push_segments(1, 7..=9).await;
    let repository = server.open().await.unwrap();
    let written = head::write(&repository, Server::cluster(), crate::pg::TimelineId::FIRST).await.unwrap();
    assert_eq!(written, HeadWritten::Written(Lsn(10 * MIB as u64)));
    server.remove_segment(9);
    let [half, ..] = that_end_early(1, 9);
    server.write_wal(&name(1, 9), &half);
    assert!(matches!(server.fetch(&name(1, 9)).await, Err(Error::Missing { .. })));
    server.write_wal(&name(1, 9), &within_a_record(1, 9));
    assert_eq!(server.fetch(&name(1, 9)).await.unwrap(), Fetched::Absent);
}

/// The server was promoted, archived the history and nothing else of its timeline, and crashed.
#[tokio::test]
async fn of_a_timeline_that_is_there_by_its_history_alone_the_server_reads_what_it_has() {
    let server = Server::new();
    server.push_segments(1, 2..=3).await;
    server.push("00000002.history", b"1\t0/300100\tx\n").await.unwrap();
    let cluster = Server::cluster();
    assert!(matches!(server.fetch(&name(2, 3)).await, Err(Error::Missing { .. })));
    let plan = server.plan();
    assert_eq!(plan.cluster, cluster);
    assert!(plan.is_bare(name(2, 3).parse().unwrap()) && !plan.is_bare(name(1, 3).parse().unwrap()));
    assert!(!plan_file::standby_plan(cluster).is_bare(name(2, 3).parse().unwrap()));
    let [half, ..] = that_end_early(2, 3);
    server.write_wal(&name(2, 3), &half);
    assert_eq!(server.fetch(&name(2, 3)).await.unwrap(), Fetched::Absent);
}
