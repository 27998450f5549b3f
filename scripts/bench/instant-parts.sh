# The parts of scripts/bench/instant, one function each, and what they share: servers of restored directories, and an
# instant restore. Sourced by it, after lib.sh. A part takes the folder of the run with the backups of `size` in it, and
# leaves it as it was but for its figures; what they mean is in docs/decisions/2008.

instant_job='' instant_place='' instant_socket=''

# The command itself where this build has it, and else a clone, which does the same but for where it does it.
instant_way() {
    if "$folder/walden" restore --help | grep -q -- --instant; then echo restore; else echo clone; fi
}

# Begins an instant restore and waits until it answers a look-up: `started`, `ended` are when. instant_begin PLACE
instant_begin() {
    local status=0
    instant_place=$1
    make_place "$folder/instant"
    rm -f "$folder/logs/"*
    store_says GET counts >/dev/null
    cold
    started=$EPOCHREALTIME
    if [ "$way" = restore ]; then
        instant_socket=$folder/answers
        walden "$1" restore --instant --target-dir "$folder/instant/data" --tablespace-map "bench=$folder/instant/tablespace" \
            --cut-over --output json >"$folder/instant.json" 2>"$folder/instant.err" &
    else
        instant_socket=$folder/state-$1/clones/instant/run
        walden "$1" clone create instant --output json >"$folder/instant.json" 2>"$folder/instant.err" &
    fi
    instant_job=$!
    until lookup "$instant_socket" 5432 >/dev/null 2>&1; do
        if [ -n "$instant_job" ] && ! kill -0 "$instant_job" 2>/dev/null; then
            wait "$instant_job" || status=$?
            instant_job=''
            [ $status = 0 ] || { cat "$folder/instant.err" >&2; exit 1; }
        fi
        sleep 0.02
    done
    ended=$EPOCHREALTIME
}

# Waits until the directory is a plain one; `plain_after` is when, in seconds since it began.
instant_wait_plain() {
    local status=0
    [ -z "$instant_job" ] || wait "$instant_job" || status=$?
    instant_job=''
    [ $status = 0 ] || { cat "$folder/instant.err" >&2; exit 1; }
    if [ "$way" = restore ]; then
        plain_after=$(field plain_after_seconds "$(cat "$folder/instant.json")")
    else
        walden "$instant_place" clone finalize instant --to "$folder/instant/data" >/dev/null
        plain_after=$(since "$started")
    fi
    [ -n "$plain_after" ] || { say "an instant restore told no time until it was plain"; exit 1; }
}

# Prints the log of its server.
instant_log() {
    if [ "$way" = restore ]; then cat "$folder/logs/"*; else cat "$folder/state-$instant_place/clones/instant/server.log"; fi
}

# Takes an instant restore away, however far it came.
instant_end() {
    local pid tries
    [ -n "$instant_place" ] || return 0
    if [ "$way" = restore ]; then
        stop_directory "$folder/instant/data"
        # Its own supervisor, which is named by the directory; it may have ended with the server.
        pid=$(pgrep -f "internal serve-restore .*$folder/instant/" | head -n 1) || true
        [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null || true
        for tries in {1..600}; do
            grep -q " $folder/instant/" /proc/mounts || break
            [ "$tries" -lt 600 ] || { say "an instant restore stays mounted"; return 1; }
            sleep 0.1
        done
    elif [ -e "$folder/state-$instant_place/clones/instant/clone.json" ]; then
        walden "$instant_place" clone delete instant >/dev/null
    fi
    [ -z "$instant_job" ] || wait "$instant_job" 2>/dev/null || true
    instant_job='' instant_place=''
    rm -rf "$folder/instant"
}

# Before the end of a run that failed: what parts have started, and what they told the source.
instant_abandon() {
    [ -n "$folder" ] || return 0
    [ -z "$postmaster" ] || sql "alter system reset all" >/dev/null 2>&1 || true
    instant_end || true
    stop_directory "$folder/restored/data"
    stop_directory "$folder/instant/data"
    ! grep -q " $folder/mnt " /proc/mounts || walden local unmount "$folder/mnt" >&2 || true
}

# Starts the server of a restored directory, on the socket in `run` beside it: start_directory TARGET [ARGUMENT...]
start_directory() {
    local log=$1/server.log
    as_postgres "$bin/postgres" -D "$1/data" -k "$1/run" -c logging_collector=off "${@:2}" >"$log" 2>&1 &
    local server=$!
    until ask "$1/run" "select 1" >/dev/null 2>&1; do
        kill -0 $server 2>/dev/null || { cat "$log" >&2; exit 1; }
        sleep 0.02
    done
}

# Stops the server of a data directory, if one runs there.
stop_directory() {
    local pid
    pid=$(head -n 1 "$1/postmaster.pid" 2>/dev/null) || return 0
    kill -INT "$pid" 2>/dev/null || return 0
    while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
}

# ask SOCKET_DIRECTORY SQL
ask() { as_postgres "$bin/psql" -XAtq -h "$1" -d bench -c "$2"; }

# A plain restore of no warm cache into a place of its own: `plain` is what it took. restore_cold PLACE
restore_cold() {
    make_place "$folder/restored"
    cold
    restore_plainly "$1" "$folder/restored" "$folder/plain-$1"
    plain=$(field seconds "$(tail -n 1 "$folder/plain-$1")")
}

remove_restored() {
    stop_directory "$folder/restored/data"
    rm -rf "$folder/restored"
}

# First queries of clones, and beside them one of a plain restore.
part_first() {
    local place run name
    for place in local far; do
        for run in $(seq "$runs"); do
            first_by_walden >>"$folder/first-$place"
            say "first, size $size, $place, run $run: $(tail -n 1 "$folder/first-$place")"
        done
        local started
        restore_from_nothing "$place"
        name="size $size, $place"
        row first "$name" "$(median_of seconds "$folder/first-$place")" s "restored plainly, s" "$restored_seconds"
        row first "$name, bytes" "$(median_of bytes "$folder/first-$place" | awk '{ printf "%.2f", $1 / 1048576 }')" MiB
        row first "$name, requests" "$(median_of requests "$folder/first-$place")" requests
    done
}

# `restored_seconds`: a plain restore, its server started, the same look-up.
restore_from_nothing() {
    make_place "$folder/restored"
    cold
    started=$EPOCHREALTIME
    restore_plainly "$1" "$folder/restored" "$folder/ignored"
    start_directory "$folder/restored"
    lookup "$folder/restored/run" 5432 >/dev/null
    restored_seconds=$(since "$started")
    remove_restored
}

# Full scans of a table of which nothing is local, as the server does them; beside them a plain restore's throughput.
part_scan() {
    local place run kind
    for place in local far; do
        for run in $(seq "$runs"); do
            restore_cold "$place"
            awk -v b="$(du -sb "$folder/restored" | cut -f 1)" -v s="$plain" 'BEGIN { printf "%.1f\n", b / s / 1e6 }' \
                >>"$folder/scan-$place-restore"
            cold
            start_directory "$folder/restored"
            scan "$folder/restored/run" >>"$folder/scan-$place-native"
            remove_restored
            for kind in no-hydrator hydrator; do
                cold
                if [ $kind = hydrator ]; then
                    walden "$place" clone create scan >/dev/null
                else
                    walden "$place" clone create scan --no-hydrate >/dev/null
                fi
                scan "$folder/state-$place/clones/scan/run" >>"$folder/scan-$place-$kind"
                walden "$place" clone delete scan >/dev/null
            done
            say "scan, $place, run $run: $(tail -qn 1 "$folder/scan-$place-"{no-hydrator,hydrator,native,restore} | xargs) MB/s" \
                "(no hydrator, hydrator, cold on ext4, plain restore)"
        done
        for kind in no-hydrator hydrator native; do
            row scan "$place, ${kind/-/ }" "$(median_file "scan-$place-$kind")" MB/s "plain restore, MB/s" \
                "$(median_file "scan-$place-restore")"
        done
    done
}

# Prints the MB/s of one scan of the accounts.
scan() {
    local from to bytes
    from=$EPOCHREALTIME
    as_postgres "$bin/psql" -XAtq -h "$1" -d bench -c "set enable_indexonlyscan = off" -c "set enable_indexscan = off" \
        -c "set enable_bitmapscan = off" -c "select count(*) from pgbench_accounts" >/dev/null
    to=$EPOCHREALTIME
    bytes=$(ask "$1" "select pg_relation_size('pgbench_accounts')")
    awk -v b="$bytes" -v s="$from" -v e="$to" 'BEGIN { printf "%.1f\n", b / (e - s) / 1e6 }'
}

# pgbench on an instant restore from its first answer on, second by second, and on a plainly restored server.
part_warm_up() {
    local run moment name started ended
    for run in $(seq "$runs"); do
        restore_cold far
        start_directory "$folder/restored"
        load "$folder/restored/run" $native_warm_seconds "$folder/pgbench"
        load "$folder/restored/run" $native_seconds "$folder/pgbench"
        rate_around 0 1e6 "$folder/pgbench" >>"$folder/warm-native"
        remove_restored
        instant_begin far
        awk -v a="$started" -v b="$ended" 'BEGIN { printf "%.2f\n", b - a }' >>"$folder/warm-answer"
        moment=$(awk -v p="$plain" -v m="${moments[2]}" 'BEGIN { t = 1.3 * p; printf "%d", (t > m ? t : m) + 3 }')
        load "$instant_socket" "$moment" "$folder/pgbench"
        [ "$way" = restore ] || say "warm-up, run $run: local by the end" \
            "$(walden far clone status instant --output json | grep -E '"(hydrated_bytes|total_bytes|state)"' | xargs)"
        instant_end
        for moment in "${moments[@]}"; do
            rate_around "$started" "$moment" "$folder/pgbench" >>"$folder/warm-$moment"
        done
        rate_around "$started" "$(awk -v p="$plain" 'BEGIN { print 1.3 * p }')" "$folder/pgbench" >>"$folder/warm-plain"
        say "warm-up, run $run: native $(tail -n 1 "$folder/warm-native") tps, answers after" \
            "$(tail -n 1 "$folder/warm-answer") s, after ${moments[*]} s" \
            "$(for moment in "${moments[@]}"; do tail -n 1 "$folder/warm-$moment"; done | xargs) tps," \
            "after 1.3 x $plain s $(tail -n 1 "$folder/warm-plain") tps"
    done
    row warm-up "first answer" "$(median_file warm-answer)" s "plain restore, s" "$(median_of seconds "$folder/plain-far")"
    for moment in "${moments[@]}"; do
        row warm-up "after $moment s" "$(median_file "warm-$moment")" tps "native, tps" "$(median_file warm-native)"
    done
    row warm-up "after 1.3 plain restores" "$(median_file warm-plain)" tps "native, tps" "$(median_file warm-native)"
}

# load SOCKET_DIRECTORY SECONDS LOG: TPC-B by two clients; what each second brought is in the log.
load() {
    as_postgres "$bin/pgbench" -h "$1" -n -c 2 -j 2 -T "$2" -P 1 --progress-timestamp bench >"$3" 2>&1 ||
        { cat "$3" >&2; exit 1; }
}

# The mean of the seconds of a log whose middle is within 1.5 s of a moment, 0 where it has none; from 0 to 1e6: of all.
rate_around() {
    awk -v from="$1" -v at="$2" '
        /^progress/ { middle = $2 - 0.5; if (from == 0 || (middle >= from + at - 1.5 && middle <= from + at + 1.5)) { sum += $4; n++ } }
        END { printf "%.1f\n", n ? sum / n : 0 }' "$3"
}

# pgbench, by turns, on a plainly restored server and on a clone of which everything is local; then on what that became.
part_after() {
    local place=local
    restore_cold $place
    start_directory "$folder/restored"
    walden $place clone create after >/dev/null
    await_cut_over after
    rates_by_turns cut-over "$folder/state-$place/clones/after/run"
    make_place "$folder/instant"
    walden $place clone finalize after --to "$folder/instant/data" >/dev/null
    start_directory "$folder/instant"
    rates_by_turns finalized "$folder/instant/run"
    stop_directory "$folder/instant/data"
    rm -rf "$folder/instant"
    remove_restored
    local load phase
    for load in TPC-B select-only; do
        for phase in cut-over finalized; do
            row after "$load, ${phase/cut-over/cut over}" "$(median_file "after-$phase-$load-walden")" tps "native, tps" \
                "$(median_file "after-$phase-$load-native")"
        done
    done
}

# rates_by_turns PHASE SOCKET_DIRECTORY
rates_by_turns() {
    local run load who socket
    local -A options=([TPC-B]='' [select-only]=-S)
    for load in TPC-B select-only; do
        # A round that does not count: both have the same in their caches then.
        for run in $(seq 0 "$runs"); do
            for who in native walden; do
                socket=$2
                [ $who = walden ] || socket=$folder/restored/run
                # Nobody's turn begins with what the one before has left to write.
                ask "$socket" checkpoint
                sync
                # shellcheck disable=SC2086
                as_postgres "$bin/pgbench" -h "$socket" -n -c 2 -j 2 -T $pgbench_seconds ${options[$load]} bench \
                    >"$folder/pgbench" 2>&1 || { cat "$folder/pgbench" >&2; exit 1; }
                [ "$run" = 0 ] || sed -n 's/^tps = \([0-9]*\.[0-9]\).*/\1/p' "$folder/pgbench" >>"$folder/after-$1-$load-$who"
            done
            [ "$run" = 0 ] || say "after, $1, $load, run $run:" \
                "$(tail -qn 1 "$folder/after-$1-$load-"{walden,native} | xargs) tps (walden, native)"
        done
    done
}

# Waits until a clone has everything and its sessions have opened their files again.
await_cut_over() {
    local status state
    while :; do
        status=$(walden local clone status "$1" --output json)
        state=$(nested hydration.state "$status")
        case $state in
            done) break ;;
            failed | off) say "the clone does not become whole: $status"; exit 1 ;;
        esac
        sleep 0.2
    done
    # It tells what keeps it from cutting over, and nothing where it has.
    sleep 2
    status=$(nested cut_over_waits_for "$(walden local clone status "$1" --output json)")
    [ -z "$status" ] || { say "the cut-over waits: $status"; exit 1; }
}

# The time until a plain directory, with nobody at it.
part_plain() {
    local place run started ended plain_after
    for place in local far; do
        for run in $(seq "$runs"); do
            restore_cold "$place"
            echo "$plain" >>"$folder/plain-$place-restore"
            remove_restored
            instant_begin "$place"
            instant_wait_plain
            instant_end
            echo "$plain_after" >>"$folder/plain-$place-instant"
            say "plain, $place, run $run: $plain_after s, a plain restore $plain s"
        done
        row plain "$place" "$(median_file "plain-$place-instant")" s "plain restore, s" "$(median_file "plain-$place-restore")"
    done
}

# Recovery of WAL that pgbench wrote behind the basebackup, on this disk.
part_redo() {
    local run started ended kind
    say "redo: $wal_mib MiB of WAL"
    archive_to walden-local
    write_wal $wal_mib
    for run in $(seq "$runs"); do
        for kind in native native-warm; do
            restore_cold local
            # What a restore wrote is in the cache; a mount begins with nothing there.
            [ $kind = native-warm ] || cold
            native_recovery
            elapsed_of <"$folder/restored/server.log" >>"$folder/redo-$kind"
            remove_restored
        done
        instant_begin local
        instant_log | elapsed_of >>"$folder/redo-instant"
        instant_end
        say "redo, run $run: $(tail -qn 1 "$folder/redo-"{instant,native,native-warm} | xargs) s for each GB" \
            "(instant, native, native with a warm cache)"
    done
    row redo local "$(median_file redo-instant)" "s/GB" "native, s/GB" "$(median_file redo-native)"
    row redo "local, beside a warm cache" "$(median_file redo-instant)" "s/GB" "native, s/GB" "$(median_file redo-native-warm)"
}

# Recovers what was restored plainly, with the restore_command that the instant restore has.
native_recovery() {
    if [ "$way" = restore ]; then
        start_directory "$folder/restored"
        return
    fi
    # A clone copies its WAL from its own mount.
    local wal=$folder/mnt/wal
    install -d -o postgres -g postgres "$folder/mnt"
    walden local mount "$folder/mnt" >&2
    start_directory "$folder/restored" -c "restore_command=cp '$wal'/%f %p || { test -e '$wal'/%f.absent && exit 1; exit 200; }"
    walden local unmount "$folder/mnt" >&2
}

# Prints how long replay took for each GB of WAL, by what a server's log says of it.
elapsed_of() {
    python3 -c '
import re, sys
log = sys.stdin.read()
place = r"([0-9A-F]+)/([0-9A-F]+)"
starts, done = re.search(rf"redo starts at {place}", log), re.search(rf"redo done at {place} .*elapsed: ([0-9.]+) s", log)
if not starts or not done:
    sys.exit("instant: the log says nothing of redo:\n" + log)
lsn = lambda found: (int(found[1], 16) << 32) + int(found[2], 16)
print(f"{float(done[3]) / ((lsn(done) - lsn(starts)) / 1e9):.2f}")'
}

# A repository that says it is a terabyte of 200 000 files, on a small real cluster: first queries, and the memory of the
# process of the mount then, after a thousand of them were read, and after some GB have become local.
part_terabyte() {
    local size=1 unit=10 place=far run started ended status counts made pid from
    make_cluster 1
    begin
    [ -n "$store_json" ] || measure_store
    start_source
    for run in 1 2 3 4 5 6 7; do
        sql "select 1 from pg_database where datname = 'more_$run'" | grep -q 1 || sql "create database more_$run"
    done
    fresh_archives walden-near
    backup_by walden near "$folder/backups" >&2
    archive_wal
    stop_server
    say "terabyte: making $made_up_files files up"
    from=$EPOCHREALTIME
    made=$(as_postgres "$folder/bench-terabyte" "$folder/walden-near.toml" $made_up_files "$folder/sample")
    say "terabyte, made in $(since "$from") s: $made"
    row terabyte "files" "$(field files "$made")" files
    row terabyte "size" "$(awk -v b="$(field bytes "$made")" 'BEGIN { printf "%.3f", b / 1e12 }')" TB
    row terabyte "in the store" "$(megabytes "$(field stored_bytes "$made")")" MB
    row terabyte "manifest" "$(awk -v b="$(field manifest_bytes "$made")" 'BEGIN { printf "%.2f", b / 1e6 }')" MB
    for run in $(seq "$runs"); do
        [ "$run" = 1 ] || walden far clone delete terabyte >/dev/null
        answer_from_clone terabyte
        result >>"$folder/terabyte"
        pid=$(field supervisor_pid "$status")
        peak_of "$pid" >>"$folder/terabyte-memory"
        say "terabyte, run $run: $(tail -n 1 "$folder/terabyte"), $(tail -n 1 "$folder/terabyte-memory") MiB"
    done
    row terabyte "far" "$(median_of seconds "$folder/terabyte")" s
    row terabyte "far, bytes" "$(median_of bytes "$folder/terabyte" | awk '{ printf "%.2f", $1 / 1048576 }')" MiB
    row terabyte "far, requests" "$(median_of requests "$folder/terabyte")" requests
    row terabyte "memory at the first query" "$(median_file terabyte-memory)" MiB
    hydrate_terabyte
    end_run
}

hydrate_terabyte() {
    local status from to mark data
    # In one process, which begins anew: its peak is that of both.
    walden far clone stop terabyte >/dev/null
    # Not as fast as it comes: while a thousand files are read it would fill the disk.
    status=$(walden far clone start terabyte --hydrate-rate 100MiB --output json)
    pid=$(field supervisor_pid "$status")
    data=$(field data_directory "$status")
    from=$EPOCHREALTIME
    mark=$(cd "$data" && head -n $read_files "$folder/sample" | xargs cat | wc -c)
    say "terabyte: $read_files files read, $mark bytes, in $(since "$from") s"
    row terabyte "memory, files read" "$(peak_of "$pid")" MiB
    status=$(walden far clone status terabyte --output json)
    mark=$(field hydrated_bytes "$status") from=$EPOCHREALTIME
    to=$((mark + hydrate_mb * 1000000))
    [ $to -lt "$(field total_bytes "$status")" ] || { say "there is too little left to hydrate: $status"; exit 1; }
    while [ "$(field hydrated_bytes "$status")" -lt $to ]; do
        [ -d "/proc/$pid" ] || { say "the process of the mount is gone"; exit 1; }
        sleep 0.5
        status=$(walden far clone status terabyte --output json)
    done
    say "terabyte: $(($(field hydrated_bytes "$status") - mark)) bytes became local in $(since "$from") s"
    row terabyte "memory, some GB hydrated" "$(peak_of "$pid")" MiB
    walden far clone delete terabyte >/dev/null
}

# The most memory that a process has had, in MiB.
peak_of() { awk '$1 == "VmHWM:" { printf "%.0f\n", $2 / 1024 }' "/proc/$1/status"; }
