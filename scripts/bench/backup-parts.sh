# The parts of scripts/bench/backup, one function each, and what they share. Sourced by it, after lib.sh. A part makes the
# cluster it needs, or takes the one that is there, and ends its run; what the figures mean is in docs/decisions/2141.

pgbench=''
# Both programs take turns, and each backs up to an archive of its own, which has all the WAL.
both=(walden peer)
# Whether the programs themselves are in the cache, where what is read is counted.
warm_programs=false

# Starts a run on the cluster of $1 times `unit`; with more arguments on a copy of it, which goes with the run.
begin_on() {
    make_cluster "$1"
    begin
    [ -n "$store_json" ] || measure_store
    if [ $# -gt 1 ]; then
        copy_cluster
        write_configurations
    fi
}

# A copy of the cluster, into which a part may put what it likes.
copy_cluster() {
    local copy=$folder/cluster link
    cp -a "$cluster" "$copy"
    for link in "$copy"/data/pg_tblspc/*; do
        ln -sfn "$copy/tablespace" "$link"
    done
    chown -h -R postgres: "$copy/data/pg_tblspc"
    cluster=$copy
}

start_resting_source() { start_source -c autovacuum=off "$@"; }

# Prints what a program stored of the cluster on this disk so far, WAL not counted.
stored_by() {
    case $1 in
        walden) du -sb "$folder/repository/bench/basebackups" ;;
        peer) du -sb "$folder/peer/backup" ;;
    esac | cut -f 1
}

# One backup of either kind by a program, with no cache warm: timed PROGRAM PLACE NAME KIND. What it took is a line in
# FOLDER/NAME-PROGRAM, what it stored one in FOLDER/NAME-PROGRAM-stored.
timed() {
    local program=$1 place=$2 name=$folder/$3-$1 kind=$4 before=0
    [ "$place" = far ] || before=$(stored_by "$program" 2>/dev/null || echo 0)
    store_says GET counts >/dev/null
    cold
    ! $warm_programs || { "$folder/walden" --version && pgbackrest version; } >/dev/null
    backup_by "$program" "$place" "$name" "$kind"
    if [ "$place" = far ]; then
        store_says GET counts >>"$name-counts"
        median_of bytes_received <(tail -n 1 "$name-counts") >>"$name-stored"
    else
        echo $(($(stored_by "$program") - before)) >>"$name-stored"
    fi
    say "$3, $program: $(tail -n 1 "$name"), $(tail -n 1 "$name-stored") bytes stored"
}

# Rows of what both programs took and stored: rows_of PART WHAT NAME
rows_of() {
    local walden=$folder/$3-walden peer=$folder/$3-peer
    row "$1" "$2" "$(median_of seconds "$walden")" s "peer, s" "$(median_of seconds "$peer")"
    row "$1" "$2, processor" "$(median_of cpu_seconds "$walden")" s "peer, s" "$(median_of cpu_seconds "$peer")"
    row "$1" "$2, stored" "$(median_bytes "$walden-stored")" MB "peer, MB" "$(median_bytes "$peer-stored")"
    row "$1" "$2, read from disks" "$(megabytes_of disk_read_bytes "$walden")" MB "peer, MB" \
        "$(megabytes_of disk_read_bytes "$peer")"
    row "$1" "$2, memory" "$(memory_of "$walden")" MiB "peer, MiB" "$(memory_of "$peer")"
}

median_bytes() { median <"$1" | awk '{ printf "%.3f", $1 / 1e6 }'; }
megabytes_of() { median_of "$1" "$2" | awk '{ printf "%.1f", $1 / 1e6 }'; }
memory_of() { median_of peak_rss_bytes "$1" | awk '{ printf "%.0f", $1 / 1048576 }'; }

# pgbench's random transactions, and everything they wrote on disk and in the archive.
transact() {
    as_postgres "$bin/pgbench" -h "$folder/run" -n -c 4 -j 2 -t $((transactions / 4)) bench >/dev/null 2>&1
    come_to_rest
}

come_to_rest() {
    sql checkpoint
    archive_wal
    sql checkpoint
}

# Writes the pages of the cluster down: record NAME
record() { as_postgres "$folder/bench-days" record "$cluster/data" "$folder/$1.record"; }
days() { as_postgres "$folder/bench-days" "$@"; }

# Full basebackups by turns.
part_full() {
    local place run program
    begin_on 1
    start_resting_source
    for place in local far; do
        for run in $(seq "$runs"); do
            for program in "${both[@]}"; do
                fresh_archives "$program-$place"
                sql checkpoint
                timed "$program" "$place" "full-$place" full
            done
        done
        rows_of full $place "full-$place"
    done
    end_run
}

# Prints the rates of pgbench in the seconds that lie between two moments.
rates_between() {
    awk -v from="$1" -v to="$2" '/^progress/ && $2 > from + 1 && $2 <= to { print $4 }' "$folder/pgbench.log"
}

# Does nothing, or backs up again and again, until that has taken so many seconds; appends the rates of that time.
load_of() {
    local program=$1 rates=$2 from to
    local ends=$((${EPOCHREALTIME%.*} + load_seconds))
    while [ "${EPOCHREALTIME%.*}" -lt "$ends" ]; do
        [ "$program" = none ] || fresh_archives "$program-local"
        sql checkpoint
        from=$EPOCHREALTIME
        if [ "$program" = none ]; then sleep "$load_seconds"; else backup_by "$program" local "$folder/tps-$program"; fi
        to=$EPOCHREALTIME
        sleep 1.2
        rates_between "$from" "$to" >>"$rates"
    done
    [ -s "$rates" ] || { say "pgbench told no rate while $program ran"; exit 1; }
}

# What pgbench reaches while each takes full local backups, one after the other, and undisturbed.
part_tps() {
    local program run rates
    begin_on 1
    rates=$folder/rates
    start_source
    sql checkpoint
    as_postgres "$bin/pgbench" -h "$folder/run" -c 4 -j 2 -T 100000 -P 1 --progress-timestamp bench \
        >/dev/null 2>"$folder/pgbench.log" &
    pgbench=$!
    sleep 10
    for run in $(seq "$runs"); do
        for program in none "${both[@]}"; do
            : >"$rates"
            load_of $program "$rates"
            awk '{ sum += $1 } END { printf "%.1f\n", sum / NR }' "$rates" >>"$folder/rates-$program"
            say "pgbench, run $run, $program: $(tail -n 1 "$folder/rates-$program") tps, the mean of" \
                "$(wc -l <"$rates") seconds; $(tail -n 1 "$folder/tps-$program" 2>/dev/null || true)"
        done
    done
    end_pgbench
    row tps undisturbed "$(median_file rates-none)" tps
    row tps "during a backup" "$(median_file rates-walden)" tps "during the peer's, tps" "$(median_file rates-peer)"
    row tps "a backup, meanwhile" "$(median_of seconds "$folder/tps-walden")" s "peer, s" \
        "$(median_of seconds "$folder/tps-peer")"
    end_run
}

end_pgbench() {
    [ -n "$pgbench" ] || return 0
    # A job of a script takes no SIGINT.
    kill -TERM "$(pgrep -P $pgbench pgbench || echo $pgbench)" 2>/dev/null || true
    wait $pgbench || true
    pgbench=''
}

# What a run that failed has left, before its folder goes.
abandon() { end_pgbench; }

# Incrementals after so many transactions, by turns, each upon its own last one; then once with nothing changed.
part_incremental() {
    local place run program changes full
    begin_on 1
    start_resting_source
    for place in local far; do
        fresh_archives "walden-$place" "peer-$place"
        come_to_rest
        for program in "${both[@]}"; do timed $program $place "first-$place" full; done
        record before
        for run in $(seq "$runs"); do
            transact
            record after
            changes=$(days changed "$folder/before.record" "$folder/after.record")
            say "incremental, $place, run $run: $changes"
            echo "$changes" >>"$folder/changes-$place"
            mv "$folder/after.record" "$folder/before.record"
            for program in "${both[@]}"; do timed $program $place "incremental-$place" incremental; done
        done
        rows_of incremental $place "incremental-$place"
        # What changed, as large as the full makes the same bytes: raw bytes by bytes stored.
        full=$(ratio_of_full "$folder/first-$place-walden")
        row incremental "$place, of what changed" "$(median_bytes "$folder/incremental-$place-walden-stored")" MB \
            "changed / $full, MB" "$(awk -v c="$(median_of changed_bytes "$folder/changes-$place")" -v r="$full" \
                'BEGIN { printf "%.3f", c / r / 1e6 }')"
        row incremental "$place, changed pages" "$(median_of changed_pages "$folder/changes-$place")" pages "all pages" \
            "$(median_of pages "$folder/changes-$place")"
        row incremental "$place, the last, says Walden" \
            "$(nested changed_pages "$(cat "$folder/incremental-$place-walden.json")")" pages "were counted" \
            "$(field changed_pages "$changes")"
        for program in "${both[@]}"; do timed $program $place "idle-$place" incremental; done
        rows_of incremental "$place, nothing changed" "idle-$place"
    done
    end_run
}

# Raw bytes for each stored one, by what Walden says of a full.
ratio_of_full() {
    awk -v raw="$(nested database_bytes "$(cat "$1.json")")" -v stored="$(tail -n 1 "$1-stored")" \
        'BEGIN { printf "%.3f", raw / stored }'
}

# A terabyte that is in the repository, in the state and in the data directory, as sparse files, and of which nothing
# changed: once in segments of 1 GB, once in many files.
part_nothing() {
    local unit=10 shape files bytes made name repeats=$runs
    # One of seven reads everything, and there is nothing to read.
    [ "$repeats" -le 4 ] || repeats=4
    for shape in 0 1; do
        files=${made_up_files[shape]} bytes=$((1 << 30)) name="${made_up_files[shape]} files"
        [ $shape = 0 ] || bytes=5242880
        begin_on 1 copied
        start_resting_source
        for made in 1 2 3 4 5 6 7; do sql "create database more_$made"; done
        fresh_archives walden-local
        come_to_rest
        timed walden local first full
        say "nothing: making $files files of $bytes bytes up"
        made=$(as_postgres "$folder/bench-terabyte" "$folder/walden-local.toml" "$files" "$folder/sample" \
            --file-bytes "$bytes" --in "$cluster/data")
        say "nothing: $made"
        row nothing "$name, size" "$(awk -v b="$(field bytes "$made")" 'BEGIN { printf "%.3f", b / 1e12 }')" TB
        row nothing "$name, state" "$(megabytes "$(field state_bytes "$made")")" MB
        row nothing "$name, manifest" "$(mebibytes "$(field manifest_bytes "$made")")" MiB
        for _ in $(seq "$repeats"); do timed walden local nothing incremental; done
        row nothing "$name" "$(median_of seconds "$folder/nothing-walden")" s
        row nothing "$name, processor" "$(median_of cpu_seconds "$folder/nothing-walden")" s
        row nothing "$name, stored" "$(mebibytes "$(median <"$folder/nothing-walden-stored")")" MiB
        row nothing "$name, memory" "$(memory_of "$folder/nothing-walden")" MiB
        row nothing "$name, read from disks" "$(megabytes_of disk_read_bytes "$folder/nothing-walden")" MB
        end_run
    done
}

# Many files of 4 KiB in the data directory: a full, and an incremental of nothing.
part_files() {
    local unit=10 run program kind
    begin_on 1 copied
    say "files: making $tiny_files files"
    tiny_files_in "$cluster/data/tiny"
    start_resting_source
    for run in $(seq "$runs"); do
        for program in "${both[@]}"; do
            fresh_archives "$program-local"
            come_to_rest
            timed "$program" local files full
            timed "$program" local files-again incremental
        done
    done
    rows_of files full files
    row files "full, rate" "$(rate_of "$tiny_files" files-walden)" "files/s" "peer, files/s" \
        "$(rate_of "$tiny_files" files-peer)"
    rows_of files "nothing changed" files-again
    end_run
}

rate_of() { median_of seconds "$folder/$2" | awk -v n="$1" '{ printf "%.0f", n / $1 }'; }

tiny_files_in() {
    as_postgres python3 -c '
import os, sys
folder, count = sys.argv[1], int(sys.argv[2])
for n in range(count):
    if n % 1000 == 0:
        os.makedirs(f"{folder}/{n // 1000:04}", mode=0o700)
    with open(f"{folder}/{n // 1000:04}/file-{n}", "wb") as file:
        # Half of it noise, so that it is worth compressing and not nothing afterwards.
        file.write(os.urandom(1024).hex().encode() * 2)' "$1" "$tiny_files"
}

# A month: transactions and an incremental each day, a retention that keeps seven; then each of the seven is restored and
# compared, the newest is scanned, and a full of the same is beside it.
part_days() {
    local day id kind kept worst full exact=0
    begin_on 1
    start_resting_source -c fsync=off
    fresh_archives walden-local
    come_to_rest
    install -d -o postgres -g postgres "$folder/days"
    for day in $(seq "$days"); do
        [ "$day" = 1 ] || transact
        record "days/before"
        backup_by walden local "$folder/month" incremental
        record "days/after"
        id=$(nested id "$(cat "$folder/month.json")")
        echo "$id" >>"$folder/ids"
        for kind in before after; do mv "$folder/days/$kind.record" "$folder/days/$id.$kind"; done
        days keep "$folder/walden-local.toml" "$days_kept" >>"$folder/kept"
        say "day $day: $id, $(tail -n 1 "$folder/month"), $(tail -n 1 "$folder/kept")"
        forget_records
    done
    kept=$(tail -n 1 "$folder/kept")
    worst=$(worst_day)
    for id in $(tail -n "$days_kept" "$folder/ids"); do
        ! is_exact "$id" || exact=$((exact + 1))
    done
    scan_beside_full
    row days "stored, the worst day" "$(mebibytes "${worst% *}")" MiB "live, MiB" "$(mebibytes "${worst#* }")"
    row days "stored, the last day" "$(mebibytes "$(field stored_bytes "$kept")")" MiB "a full's, MiB" \
        "$(mebibytes "$full")"
    row days "live, the last day" "$(mebibytes "$(field live_bytes "$kept")")" MiB "a full's, MiB" "$(mebibytes "$full")"
    row days "an incremental" "$(median_of seconds <(tail -n +2 "$folder/month"))" s "the first, s" \
        "$(median_of seconds <(head -n 1 "$folder/month"))"
    row days "bit-exact" "$exact" of "kept" "$days_kept"
    end_run
}

# The records of what is not kept any more.
forget_records() {
    local id
    for id in $(head -n "-$days_kept" "$folder/ids"); do rm -f "$folder/days/$id".{before,after}; done
}

# Prints stored and live bytes of the day on which the one was most of the other, of those with all that are kept.
worst_day() {
    local line
    while read -r line; do
        [ "$(field kept "$line")" -lt "$days_kept" ] || echo "$(field stored_bytes "$line") $(field live_bytes "$line")"
    done <"$folder/kept" | awk '{ if ($1 / $2 > most) { most = $1 / $2; day = $0 } } END { print day }'
}

# Restores a basebackup of the month and compares it with what the server had.
is_exact() {
    local status=0 found
    make_place "$folder/restored"
    as_postgres "$folder/walden" --config "$folder/walden-local.toml" --no-progress restore "$1" \
        --target-dir "$folder/restored/data" --tablespace-map "bench=$folder/restored/tablespace" >/dev/null
    found=$(days compare "$folder/days/$1.before" "$folder/days/$1.after" "$folder/restored/data") || status=$?
    rm -rf "$folder/restored"
    say "day $1: $found"
    [ $status = 0 ]
}

# `full`: what a full of the last day stores.
scan_beside_full() {
    local incremental beside
    incremental=$(days scan "$folder/walden-local.toml" latest)
    timed walden local full full
    full=$(nested stored_bytes "$(cat "$folder/full-walden.json")")
    beside=$(days scan "$folder/walden-local.toml" latest)
    say "days, scanned: $incremental, $beside"
    row days "fetched by a scan" "$(mebibytes "$(field fetched_bytes "$incremental")")" MiB "of a full, MiB" \
        "$(mebibytes "$(field fetched_bytes "$beside")")"
    row days "requests of a scan" "$(field requests "$incremental")" requests "of a full" "$(field requests "$beside")"
}

# Fulls by one thread and by two, and of 1, 4 and 16 GB.
part_scaling() {
    local threads size
    begin_on 1
    for threads in 1 2; do configure_threads $threads; done
    start_resting_source
    for threads in 1 2; do full_by_turns "threads-$threads"; done
    local one=$folder/scaling-threads-1-walden two=$folder/scaling-threads-2-walden
    row scaling "1 thread" "$(median_of seconds "$one")" s "peer, 1 process, s" \
        "$(median_of seconds "${one%walden}peer")"
    row scaling "2 threads" "$(median_of seconds "$two")" s "peer, 2 processes, s" \
        "$(median_of seconds "${two%walden}peer")"
    row scaling "2 threads, of twice 1 thread" "$(rate_of 1e6 scaling-threads-2-walden)" "" "" \
        "$(rate_of 2e6 scaling-threads-1-walden)"
    row scaling "1 thread, memory" "$(memory_of "$one")" MiB
    row scaling "2 threads, memory" "$(memory_of "$two")" MiB
    end_run
    local unit=$gigabyte
    for size in 1 4 16; do scale_of $size; done
}

# Configurations for so many threads of Walden and processes of the peer, of an archive on this disk.
configure_threads() {
    local place=threads-$1
    sed "s|/state-local|/state-$place|; s|/run-local|/run-$place|" "$folder/walden-local.toml" >"$folder/walden-$place.toml"
    printf '\n[limits]\nthreads = %s\n' "$1" >>"$folder/walden-$place.toml"
    install -d -o postgres -g postgres "$folder/state-$place" "$folder/run-$place"
    sed "s/^process-max=.*/process-max=$1/" "$folder/peer-local.conf" >"$folder/peer-$place.conf"
}

# full_by_turns PLACE: a configuration of an archive on this disk.
full_by_turns() {
    local run program
    for run in $(seq "$runs"); do
        for program in "${both[@]}"; do
            fresh_archives "$program-local"
            sql checkpoint
            timed "$program" "$1" "scaling-$1" full
        done
    done
}

scale_of() {
    local bytes name="$1 GB"
    begin_on "$1"
    start_resting_source
    bytes=$(sql "select sum(pg_database_size(oid)) from pg_database")
    full_by_turns local
    row scaling "$name" "$(median_of seconds "$folder/scaling-local-walden")" s "peer, s" \
        "$(median_of seconds "$folder/scaling-local-peer")"
    row scaling "$name, rate" "$(rate_of "$bytes" scaling-local-walden | awk '{ printf "%.1f", $1 / 1e6 }')" MB/s \
        "of 1 GB, MB/s" "${figure[scaling, 1 GB, rate]:-}"
    row scaling "$name, memory" "$(memory_of "$folder/scaling-local-walden")" MiB "of 1 GB, MiB" \
        "${figure[scaling, 1 GB, memory]:-}"
    end_run
    # The large one is what the next part takes.
    [ "$1" = 16 ] || $keep || rm -rf "$cluster"
}

# One table of 100 MB changed in 16 GB of which nothing is in a cache.
part_changed() {
    local unit=$gigabyte rows=100000 run since changed program warm_programs=true
    begin_on 16
    start_resting_source
    ! $small || rows=10000
    sql "drop table if exists changed; create table changed as select n, repeat(md5(n::text), 30) as text
        from generate_series(1, $rows) n" bench
    fresh_archives walden-local peer-local
    come_to_rest
    for program in "${both[@]}"; do timed $program local changed-first full; done
    for run in $(seq "$runs"); do
        sleep 2.5
        since=$EPOCHREALTIME
        sql "update changed set text = reverse(text)" bench
        sql "vacuum changed" bench
        come_to_rest
        changed=$(changed_bytes "$since")
        echo "{\"bytes\":$changed}" >>"$folder/changed-files"
        for program in "${both[@]}"; do timed $program local changed incremental; done
    done
    rows_of changed "a table" changed
    row changed "read from the disk" "$(megabytes_of disk_read_bytes "$folder/changed-walden")" MB "changed files, MB" \
        "$(megabytes_of bytes "$folder/changed-files")"
    row changed "returned by reads" "$(megabytes_of file_read_bytes "$folder/changed-walden")" MB "changed files, MB" \
        "$(megabytes_of bytes "$folder/changed-files")"
    sql "drop table changed" bench
    end_run
}

# The bytes of the files of a basebackup that were written to since a moment.
changed_bytes() {
    find -L "$cluster/data/base" "$cluster/data/global" "$cluster/data/pg_tblspc" "$cluster/data/pg_xact" -type f \
        -newerct "@$1" -printf '%s\n' | awk '{ sum += $1 } END { printf "%d", sum }'
}
