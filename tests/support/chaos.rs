//! A load that a backup must survive: pgbench, tables that come, go, are emptied and rewritten, one that
//! grows, and a ledger that remembers which commits the server acknowledged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime;
use tokio_postgres::{Client, Error, NoTls};

use super::{Pgbench, Sql, wait_for};

/// Tables of the churn that stand at any time; older ones are dropped.
const CHURN_TABLES: i64 = 3;

/// The load, on one database, until it is finished.
#[derive(Debug)]
pub struct Chaos {
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<Result<(), Error>>>,
    pgbench: Pgbench,
    ledger: Ledger,
    churned: Arc<AtomicI64>,
}

/// The commits the server acknowledged: ids from one without a gap, in table `ledger`.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    acknowledged: Arc<AtomicI64>,
}

impl Chaos {
    /// Creates what the load needs and starts it.
    #[track_caller]
    pub fn start(sql: &Sql) -> Self {
        if sql.sql("select to_regclass('pgbench_accounts') is null") == "t" {
            Pgbench::initialize(sql, 1);
        }
        sql.sql(
            "create table if not exists ledger (id bigint primary key, at timestamptz not null default clock_timestamp());
             truncate ledger;
             create table if not exists growing (id bigserial primary key, payload text);
             do $$ declare old text; begin
                 for old in select relname from pg_class where relname like 'churn\\_%' and relkind = 'r' loop
                     execute 'drop table ' || old;
                 end loop;
             end $$",
        );
        let stop = Arc::new(AtomicBool::new(false));
        let ledger = Ledger::default();
        let churned = Arc::default();
        let workers = [Work::Ledger(ledger.clone()), Work::Grow, Work::Churn(Arc::clone(&churned))];
        let workers = workers.map(|work| work.start(sql.connection(), Arc::clone(&stop)));
        Self { workers: workers.into(), pgbench: Pgbench::start(sql, 2), stop, ledger, churned }
    }

    /// Returns the ledger, which goes on while the load does.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Waits until the server has acknowledged that many more commits.
    #[track_caller]
    pub fn wait_for_commits(&self, more: i64) {
        self.wait_for(&self.ledger.acknowledged, more, "commits of the ledger");
    }

    /// Waits until that many more tables were made, filled, rewritten and emptied.
    #[track_caller]
    pub fn wait_for_churn(&self, more: i64) {
        self.wait_for(&self.churned, more, "tables to come and go");
    }

    #[track_caller]
    fn wait_for(&self, counter: &AtomicI64, more: i64, what: &str) {
        let aim = counter.load(Ordering::Acquire) + more;
        wait_for(what, || {
            let failed = self.workers.iter().any(JoinHandle::is_finished);
            let reached = counter.load(Ordering::Acquire) >= aim;
            (reached || failed).then_some(())
        });
        assert!(counter.load(Ordering::Acquire) >= aim, "the load failed while waiting for {what}");
    }

    /// Stops the load; fails if the server refused any of it.
    #[track_caller]
    pub fn finish(mut self) -> Ledger {
        assert!(self.pgbench.is_running(), "pgbench gave up");
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            let outcome = worker.join().expect("a worker returns its errors");
            outcome.unwrap_or_else(|error| panic!("the load failed: {error:?}"));
        }
        self.ledger.clone()
    }

    /// Ends the load after the server was taken from it.
    pub fn abandon(mut self) -> Ledger {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            let _ = worker.join().expect("a worker returns its errors");
        }
        self.ledger.clone()
    }
}

impl Drop for Chaos {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Ledger {
    /// Returns the id of the last commit the server acknowledged.
    pub fn acknowledged(&self) -> i64 {
        self.acknowledged.load(Ordering::Acquire)
    }

    /// Checks in any copy of the cluster that all commits up to `acknowledged` are there, and none is missing in between.
    #[track_caller]
    pub fn assert_holds(sql: &Sql, acknowledged: i64) {
        let rows = sql.rows("select count(*), coalesce(max(id), 0) from ledger").concat();
        let [count, last] = [0, 1].map(|column| rows[column].parse::<i64>().unwrap());
        assert_eq!(count, last, "the ledger has gaps");
        assert!(last >= acknowledged, "{acknowledged} commits were acknowledged, {last} are there");
    }
}

/// What one connection does over and over.
enum Work {
    Ledger(Ledger),
    Grow,
    Churn(Arc<AtomicI64>),
}

impl Work {
    fn start(self, connection: String, stop: Arc<AtomicBool>) -> JoinHandle<Result<(), Error>> {
        std::thread::spawn(move || {
            let runtime =
                runtime::Builder::new_current_thread().enable_all().build().expect("threads are to be had");
            runtime.block_on(async {
                let (client, driver) = tokio_postgres::connect(&connection, NoTls).await?;
                let driver = tokio::spawn(driver);
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    self.once(&client, round).await?;
                }
                driver.abort();
                Ok(())
            })
        })
    }

    async fn once(&self, client: &Client, round: i64) -> Result<(), Error> {
        match self {
            Self::Ledger(ledger) => {
                client.execute("insert into ledger (id) values ($1)", &[&round]).await?;
                ledger.acknowledged.store(round, Ordering::Release);
            }
            Self::Grow => {
                let rows = "insert into growing (payload) select repeat(md5(random()::text), 20) from generate_series(1, 50)";
                client.batch_execute(rows).await?;
                client.batch_execute("update growing set payload = payload || 'x' where id % 97 = 0").await?;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Self::Churn(churned) => {
                for statement in churn(round) {
                    client.batch_execute(&statement).await?;
                }
                churned.store(round, Ordering::Release);
            }
        }
        Ok(())
    }
}

/// Statements that make, fill, empty, rewrite and drop files of relations; each by itself, for so `vacuum` wants it.
fn churn(round: i64) -> [String; 7] {
    let table = format!("churn_{round}");
    let old = format!("churn_{}", (round - CHURN_TABLES).max(0));
    [
        format!(
            "create table {table} as select n as id, md5(n::text) as payload from generate_series(1, 2000) n"
        ),
        format!("create index on {table} (payload)"),
        format!("delete from {table} where id % 2 = 0"),
        format!("vacuum full {table}"),
        format!("truncate {table}"),
        format!("insert into {table} select n, repeat('y', 100) from generate_series(1, 500) n"),
        format!("drop table if exists {old}"),
    ]
}
