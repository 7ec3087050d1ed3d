#!/bin/sh
# Usage: tests/run.sh TEST...   (programs and .sh scripts)
# Runs each test, prints one line for it, and its whole output when it failed. The last line of a test is
# "N passed, N failed" or "N passed, N failed, N skipped"; the last line here is their sum. A test without that line
# (it crashed), or one that returns non-zero without a failure, counts as one failure.
# TEST_TIMEOUT=SECONDS (default 600) stops a test that hangs; TEST_VERBOSE=1 prints every output.
# OpenMP threads sleep when idle, unless OMP_WAIT_POLICY says otherwise: spinning would starve what else runs.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
passed=0 failed=0 skipped=0
log=$(mktemp "${TMPDIR:-/tmp}/moe_test.XXXXXX") || exit 1
trap 'rm -f "$log"' EXIT
trap 'exit 1' HUP INT TERM
limit=
if command -v timeout >/dev/null 2>&1; then limit="timeout ${TEST_TIMEOUT:-600}"; fi

for test in "$@"; do
    begin=$(date +%s)
    case $test in
        *.sh) $limit sh "$test" >"$log" 2>&1 ;;
        */*) $limit "$test" >"$log" 2>&1 ;;
        *) $limit "./$test" >"$log" 2>&1 ;;
    esac
    code=$?
    seconds=$(($(date +%s) - begin))
    name=${test##*/}
    line=$(tail -n 1 "$log")
    counts=$(printf '%s\n' "$line" |
        sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed\(, \([0-9][0-9]*\) skipped\)\{0,1\}$/\1 \2 0\4/p')
    if [ -z "$counts" ]; then
        why="no summary line, exit code $code"
        if [ "$code" -eq 124 ]; then why="stopped after ${TEST_TIMEOUT:-600} s"; fi
        line="FAILED: $why"
        counts="0 1 0"
    fi
    p=${counts%% *} s=${counts##* 0}
    f=${counts#* } f=${f%% *}
    if [ "$f" -eq 0 ] && [ "$code" -ne 0 ]; then
        f=1
        line="FAILED: exit code $code after \"$line\""
    fi
    if [ "$((p + f + ${s:-0}))" -eq 0 ]; then
        f=1
        line="FAILED: no test ran"
    fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + ${s:-0}))
    printf '%-28s %s (%d s)\n' "$name" "$line" "$seconds"
    if [ "$f" -ne 0 ] || [ -n "${TEST_VERBOSE:-}" ]; then
        sed 's/^/    /' "$log"
    else
        sed -n 's/^skipped /    skipped /p' "$log"
    fi
done

if [ "$skipped" -ne 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ]
