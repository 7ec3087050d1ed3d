# What scripts share that count checks; to be sourced from the repository's folder with their name in $suite. A folder
# of their own is $tmp, the compiler $cc. The last line is finish's.
cc=${CC:-cc}
tmp=$(mktemp -d "${TMPDIR:-/tmp}/test-$suite.XXXXXX") || exit 1
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
passed=0 failed=0 skipped=0
check() { # check WHAT COMMAND...
    what=$1
    shift
    if "$@" >"$tmp/log" 2>&1; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "FAILED: $what: $*"
        head -n 12 "$tmp/log"
    fi
}
skip() { # skip WHAT WHY
    skipped=$((skipped + 1))
    echo "skipped $1: $2"
}
finish() {
    echo "$passed passed, $failed failed$([ "$skipped" -eq 0 ] || echo ", $skipped skipped")"
    [ "$failed" -eq 0 ]
    exit
}
