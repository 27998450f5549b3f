//! Sessions that write as pgbench does, each remembering which of its commits the server acknowledged; beside them one that
//! makes, rewrites, cuts and drops tables.
//!
//! What a session wrote in a transaction is in it as a row too, numbered from one without a gap. So whatever becomes of the
//! server, one sees afterwards that nothing acknowledged is missing, and that no transaction is there in part.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime;
use tokio_postgres::{Client, Error, NoTls};

use super::{Pgbench, Sql, wait_for};

/// Sessions that write.
const WRITERS: usize = 4;
/// Accounts they write to: so many are small enough to be added up often, and to leave most of the table unread.
const ACCOUNTS: u64 = 10_000;
/// Tables of the churn that stand at any time.
const CHURN_TABLES: u64 = 3;

/// The load, until it is ended.
#[derive(Debug)]
pub struct Writers {
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<Result<(), Error>>>,
    acknowledged: Vec<Arc<AtomicI64>>,
    before: i64,
}

/// The last commit of each session that the server acknowledged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Acknowledged(Vec<i64>);

impl Writers {
    /// Makes the tables: pgbench's at a scale, that of the commits, and one that is cut and grows again.
    #[track_caller]
    pub fn prepare(sql: &Sql, scale: u32) {
        Pgbench::initialize(sql, scale);
        sql.sql(
            "create table commits (writer int, id bigint, primary key (writer, id));
             create table breathing as select n, md5(n::text) as text from generate_series(1, 20000) n;
             vacuum breathing",
        );
    }

    /// Reads all that the sessions write to, so that no page of it is missing where it comes from a store.
    #[track_caller]
    pub fn warm(sql: &Sql) {
        let accounts = format!("select sum(abalance) from pgbench_accounts where aid <= {ACCOUNTS}");
        sql.sql(&format!("{accounts}; set enable_seqscan = off; set enable_bitmapscan = off; {accounts}"));
        sql.sql("select count(*) from pgbench_tellers, pgbench_branches, breathing");
    }

    /// Starts the load; what is drawn in it comes from `seed`.
    pub fn start(sql: &Sql, seed: u64, before: &Acknowledged) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let acknowledged: Vec<_> =
            (0..WRITERS).map(|writer| Arc::new(AtomicI64::new(before.of(writer)))).collect();
        let write = |(writer, last): (usize, &Arc<AtomicI64>)| {
            let draw = Draw(seed.wrapping_add(writer as u64));
            work(sql, &stop, Work::Write { writer, last: last.clone(), draw })
        };
        let mut workers: Vec<_> = acknowledged.iter().enumerate().map(write).collect();
        workers.push(work(sql, &stop, Work::Churn(Draw(seed))));
        Self { stop, workers, acknowledged, before: before.0.iter().sum() }
    }

    /// Returns how many commits were acknowledged since the start.
    pub fn commits(&self) -> i64 {
        self.acknowledged.iter().map(|last| last.load(Ordering::Acquire)).sum::<i64>() - self.before
    }

    /// Waits until there were that many since the start.
    #[track_caller]
    pub fn wait_for_commits(&self, count: i64) {
        wait_for("commits", || {
            let failed = self.workers.iter().any(JoinHandle::is_finished);
            (self.commits() >= count || failed).then_some(())
        });
        assert!(self.commits() >= count, "the load failed after {} of {count} commits", self.commits());
    }

    /// Ends the load, whatever has become of its server.
    pub fn end(mut self) -> Acknowledged {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            let _ = worker.join().expect("a worker returns its errors");
        }
        Acknowledged(self.acknowledged.iter().map(|last| last.load(Ordering::Acquire)).collect())
    }

    /// Ends the load; fails if the server refused any of it.
    #[track_caller]
    pub fn finish(mut self) -> Acknowledged {
        self.stop.store(true, Ordering::Relaxed);
        for worker in std::mem::take(&mut self.workers) {
            let outcome = worker.join().expect("a worker returns its errors");
            outcome.unwrap_or_else(|error| panic!("the load failed: {error:?}"));
        }
        self.end()
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Acknowledged {
    fn of(&self, writer: usize) -> i64 {
        self.0.get(writer).copied().unwrap_or(0)
    }

    /// Returns how many commits that are.
    pub fn total(&self) -> i64 {
        self.0.iter().sum()
    }

    /// Checks that every commit is there, none in part, and takes note of those that are there without an acknowledgement.
    #[track_caller]
    pub fn assert_hold(&mut self, sql: &Sql) {
        let found = sql.rows("select writer, count(*), max(id) from commits group by writer order by writer");
        let number = |text: &String| text.parse::<i64>().unwrap();
        let mut last = vec![0; WRITERS];
        for row in &found {
            let [writer, count, max] = [0, 1, 2].map(|column| number(&row[column]));
            assert_eq!(count, max, "the commits of writer {writer} have gaps");
            last[usize::try_from(writer).unwrap()] = max;
        }
        for (writer, last) in last.iter().enumerate() {
            let acknowledged = self.of(writer);
            assert!(*last >= acknowledged, "writer {writer}: {acknowledged} acknowledged, {last} are there");
        }
        self.0 = last;
        let balances = sql.rows(&format!(
            "select (select sum(abalance) from pgbench_accounts where aid <= {ACCOUNTS}),
                    (select sum(tbalance) from pgbench_tellers), (select sum(bbalance) from pgbench_branches),
                    (select coalesce(sum(delta), 0) from pgbench_history), (select count(*) from pgbench_history)"
        ));
        let [accounts, tellers, branches, history, transactions] = balances[0].as_slice() else {
            panic!("{balances:?}")
        };
        assert_eq!([accounts, tellers, branches], [history; 3], "the balances do not agree");
        assert_eq!(number(transactions), self.total(), "a transaction is there in part");
    }

    /// Checks the tables that the load hardly touches, which takes reading all of them.
    #[track_caller]
    pub fn assert_rest(&self, sql: &Sql) {
        let untouched =
            format!("select count(*) from pgbench_accounts where aid > {ACCOUNTS} and abalance <> 0");
        assert_eq!(sql.sql(&untouched), "0");
        assert_eq!(sql.sql("select count(*) from breathing where text <> md5(n::text)"), "0");
    }
}

/// Numbers from a seed, the same ones each time.
#[derive(Debug, Clone)]
pub struct Draw(pub u64);

impl Draw {
    /// Draws a number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    /// Draws one of several.
    pub fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// What one connection does over and over.
enum Work {
    Write { writer: usize, last: Arc<AtomicI64>, draw: Draw },
    Churn(Draw),
}

fn work(sql: &Sql, stop: &Arc<AtomicBool>, mut work: Work) -> JoinHandle<Result<(), Error>> {
    let (connection, stop) = (sql.connection(), stop.clone());
    std::thread::spawn(move || {
        let runtime =
            runtime::Builder::new_current_thread().enable_all().build().expect("threads are to be had");
        runtime.block_on(async {
            let (client, driver) = tokio_postgres::connect(&connection, NoTls).await?;
            let driver = tokio::spawn(driver);
            while !stop.load(Ordering::Relaxed) {
                // Whoever waits for commits learns only that there are none.
                work.once(&client).await.inspect_err(|error| eprintln!("a session ended: {error:?}"))?;
            }
            driver.abort();
            Ok(())
        })
    })
}

impl Work {
    async fn once(&mut self, client: &Client) -> Result<(), Error> {
        match self {
            Self::Write { writer, last, draw } => {
                let id = last.load(Ordering::Acquire) + 1;
                client.batch_execute(&transaction(*writer, id, draw)).await?;
                last.store(id, Ordering::Release);
            }
            Self::Churn(draw) => {
                for statement in churn(draw) {
                    client.batch_execute(&statement).await?;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        Ok(())
    }
}

/// What pgbench does in one transaction, and the row that says so. Rows are locked in the order of the tables, so nobody
/// waits in a circle.
fn transaction(writer: usize, id: i64, draw: &mut Draw) -> String {
    let (account, delta) = (1 + draw.below(ACCOUNTS), draw.below(10_000) as i64 - 5000);
    let (teller, branch) = (1 + draw.below(10), 1);
    format!(
        "begin;
         update pgbench_accounts set abalance = abalance + {delta} where aid = {account};
         update pgbench_tellers set tbalance = tbalance + {delta} where tid = {teller};
         update pgbench_branches set bbalance = bbalance + {delta} where bid = {branch};
         insert into pgbench_history (tid, bid, aid, delta, mtime)
         values ({teller}, {branch}, {account}, {delta}, now());
         insert into commits (writer, id) values ({writer}, {id});
         commit"
    )
}

/// Statements that make, fill, rewrite, empty and drop files of relations, and cut one of the basebackup's and let it grow
/// again; each by itself, for so `vacuum` wants it.
fn churn(draw: &mut Draw) -> [String; 9] {
    let table = format!("churn_{}", draw.below(CHURN_TABLES));
    let rows = 500 + draw.below(2000);
    let kept = 1000 + draw.below(10_000);
    [
        format!("drop table if exists {table}"),
        format!(
            "create table {table} as select n as id, md5(n::text) as text from generate_series(1, {rows}) n"
        ),
        format!("create index on {table} (text)"),
        format!("delete from {table} where id % 2 = 0"),
        format!("vacuum full {table}"),
        format!("truncate {table}"),
        format!("delete from breathing where n > {kept}"),
        "vacuum (truncate true) breathing".to_owned(),
        format!(
            "insert into breathing select n, md5(n::text) from generate_series({kept} + 1, {kept} + {rows}) n"
        ),
    ]
}
