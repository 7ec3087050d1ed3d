#!/bin/sh
# Usage: tests/lib/run.sh TEST...   (programs and .sh scripts)
# Runs the tests, JOBS at a time (default: the number of processors), prints one line for each as it ends, and its
# whole output if it failed. The last line of a test is "N passed, N failed" or "N passed, N failed, N skipped"; the
# last line here is their sum. A test without that line (it crashed), or one that returns non-zero without a failure,
# counts as one failure. TEST_TIMEOUT=SECONDS (default 600) stops a test that hangs; TEST_VERBOSE=1 prints all output.

# OpenMP threads sleep when idle, unless OMP_WAIT_POLICY says otherwise: spinning would starve what else runs.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

# One test: DIRECTORY TEST; leaves "passed failed skipped" in DIRECTORY/name.counts.
if [ "${1:-}" = --one ]; then
    test=$3 shown=${3#"${BUILD:-build}"/}
    shown=${shown#tests/}
    name=$(printf '%s' "$shown" | tr / .)
    log=$2/$name.log
    limit=
    if command -v timeout >/dev/null 2>&1; then limit="timeout ${TEST_TIMEOUT:-600}"; fi
    begin=$(date +%s)
    case $test in
        *.sh) $limit sh "$test" >"$log" 2>&1 ;;
        */*) $limit "$test" >"$log" 2>&1 ;;
        *) $limit "./$test" >"$log" 2>&1 ;;
    esac
    code=$?
    seconds=$(($(date +%s) - begin))
    line=$(tail -n 1 "$log")
    counts=$(printf '%s\n' "$line" |
        sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1 \2 0/p
                s/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed, \([0-9][0-9]*\) skipped$/\1 \2 \3/p')
    case $counts in
        '')
            line="FAILED: no summary line, exit code $code"
            if [ "$code" -eq 124 ]; then line="FAILED: stopped after ${TEST_TIMEOUT:-600} s"; fi
            counts='0 1 0'
            ;;
        '0 0 0') line='FAILED: no test ran' counts='0 1 0' ;;
        *' 0 '*)
            if [ "$code" -ne 0 ]; then
                line="FAILED: exit code $code after \"$line\"" counts="${counts%% *} 1 ${counts##* }"
            fi
            ;;
    esac
    echo "$counts" >"$2/$name.counts"
    {
        printf '%-32s %s (%d s)\n' "$shown" "$line" "$seconds"
        case $counts in
            *' 0 '*)
                if [ -n "${TEST_VERBOSE:-}" ]; then sed 's/^/    /' "$log"; else sed -n 's/^skipped /    &/p' "$log"; fi
                ;;
            *) sed 's/^/    /' "$log" ;;
        esac
    } >"$2/$name.text"
    cat "$2/$name.text" # at once, so that tests which end together do not mix their lines
    exit 0
fi

dir=$(mktemp -d "${TMPDIR:-/tmp}/moe_test.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
for test in "$@"; do printf '%s\n' "$test"; done |
    xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}" -n 1 sh "$0" --one "$dir"
cat "$dir"/*.counts | awk -v tests=$# '
    { passed += $1; failed += $2; skipped += $3 }
    END {
        failed += tests - NR # those that left nothing behind
        printf "%d passed, %d failed", passed, failed
        if (skipped) printf ", %d skipped", skipped
        print ""
        exit failed != 0
    }'
