#!/bin/sh
# Fresh memory that is used before it is written, and memory that is not ours: the suites under clang's memory sanitizer
# (scalar kernels) and a few under valgrind (with AVX2 where it is). Without an argument both; otherwise: sanitizer,
# valgrind, or either and the suites to run (tests/NAME.c). FRESH=quick leaves the slowest out. The last line is
# "N passed, N failed[, N skipped]".
cd "$(dirname "$0")/../.." || exit 1
suite=fresh
. tests/lib/check.sh
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}
only=${1:-all}
[ $# -gt 0 ] && shift
skipped=0

# Suites with the library in themselves are left out: they would take minutes each to compile.
of_library() { for name in "$@"; do grep -q '^#define MOE_IMPLEMENTATION' "tests/$name.c" || echo "$name"; done; }
all=$(for file in tests/*.c tests/contract/*.c; do echo "${file#tests/}"; done | sed 's/\.c$//')
if [ "${FRESH:-all}" = quick ]; then
    all=$(echo "$all" | grep -v -x 'game\|balance\|contract/batch\|contract/bits') # the slowest; others run their code
fi

# One suite: NAME DIRECTORY RUNNER COMPILER OPTION...
cat >"$tmp/one" <<'END'
name=$1 dir=$2 runner=$3
shift 3
log=$dir/$(echo "$name" | tr / .)
"$@" -O0 -w -I. -Itests/lib "tests/$name.c" "$dir/moe.o" -o "$log.run" -lm >"$log.log" 2>&1 &&
    $runner "$log.run" >>"$log.log" 2>&1 && touch "$log.passed"
rm -f "$log.run"
END
run() { # WHAT RUNNER SUITES COMPILER OPTION...: the library once, then the suites
    what=$1 runner=$2 suites=$3 dir=$tmp/$1
    shift 3
    mkdir -p "$dir"
    check "$what: the library" "$@" -w -I. -Itests/lib -c tests/lib/moe.c -o "$dir/moe.o"
    for name in $suites; do echo "$name"; done | xargs -P "$jobs" -I{} sh "$tmp/one" {} "$dir" "$runner" "$@"
    for name in $suites; do
        log=$dir/$(echo "$name" | tr / .)
        check "$what: $name" sh -c '[ -e "$1.passed" ] || { tail -n 40 "$1.log"; exit 1; }' sh "$log"
    done
}
skip() { # WHAT WHY
    skipped=$((skipped + 1))
    echo "skipped $1: $2"
}
echo 'int main(void) { return 0; }' >"$tmp/hello.c"
clang=
for each in clang clang-19; do # the compiler may stand there without the sanitizer's library
    [ -z "$clang" ] && "$each" -fsanitize=memory "$tmp/hello.c" -o "$tmp/hello" 2>/dev/null && clang=$each
done

fma=$([ "$(uname -m)" = x86_64 ] && grep -q ' fma ' /proc/cpuinfo && echo -mfma) # or fmaf is a slow call
if [ "$only" != valgrind ] && [ -z "$clang" ]; then
    skip sanitizer "no clang that has it (Debian: clang libclang-rt-dev)"
elif [ "$only" != valgrind ]; then
    # shellcheck disable=SC2086 # words
    run sanitizer '' "$(of_library ${*:-$all})" \
        $clang -std=c99 -O1 -g1 $fma -fsanitize=memory -fno-omit-frame-pointer -DMOE_NO_SIMD
fi
if [ "$only" != sanitizer ] && ! command -v valgrind >/dev/null 2>&1; then
    skip valgrind "not installed"
elif [ "$only" != sanitizer ]; then
    # not game: it measures in long double, which valgrind computes in double
    # shellcheck disable=SC2086
    run valgrind 'valgrind -q --error-exitcode=9 --leak-check=full' \
        "$(of_library ${*:-layer passes select routes optimiser controllers health save contract/mask})" \
        gcc -std=c99 -O1 -g1 -DTEST_FRESH=1 -DTEST_SANITIZED=1
fi

[ "$skipped" -eq 0 ] && finish
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
