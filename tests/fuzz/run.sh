#!/bin/sh
# Usage: tests/fuzz/run.sh [RUNS [TARGET...]]   (default: 1000000 runs of each; `make fuzz RUNS=...`)
# Builds each target with clang's libFuzzer and the sanitizers and runs it from what is in corpus/TARGET. What it finds
# goes to build/fuzz/TARGET (new inputs) and build/fuzz/TARGET-crash-... (faults: exit status 1); with KEEP=1 what adds
# coverage is put into the repository's corpus. CLANG: the compiler. CPPFLAGS=-DMOE_NO_SIMD: the scalar kernels alone,
# which is built sooner. SECONDS_EACH=N: at most so long a target.
cd "$(dirname "$0")/../.." || exit 1
clang=${CLANG:-$(command -v clang-19 || command -v clang)} || { echo "no clang"; exit 1; }
runs=${1:-1000000}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- desc file layer model routes tokenizer
out=${BUILD:-build}/fuzz
failed=0
mkdir -p "$out"
# shellcheck disable=SC2086
build() { # ARGUMENTS...: with the sanitizers
    "$clang" -std=c99 -g1 -O1 -fsanitize=fuzzer"$link",address,undefined -fno-sanitize-recover=all -ffp-contract=off \
        ${CPPFLAGS:-} -I. "$@" || exit 1
}
link=-no-link
[ "$out/moe.o" -nt moe.h ] || build -DMOE_IMPLEMENTATION -x c -c moe.h -o "$out/moe.o"
link=
for target in "$@"; do
    mkdir -p "$out/$target"
    build "tests/fuzz/$target.c" "$out/moe.o" -o "$out/fuzz_$target" -lm
    "$out/fuzz_$target" -runs="$runs" -max_total_time="${SECONDS_EACH:-0}" -max_len=4096 -timeout=20 \
        -rss_limit_mb=2048 -verbosity=1 -print_final_stats=1 -artifact_prefix="$out/$target-" \
        "$out/$target" "tests/fuzz/corpus/$target" >"$out/$target.log" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=1
    awk -v target="$target" -v status=$status '
        /stat::number_of_executed_units/ { runs = $2 }
        /stat::average_exec_per_sec/ { rate = $2 }
        / cov: / { for (i = 1; i < NF; i++) if ($i == "cov:") cov = $(i + 1); else if ($i == "ft:") ft = $(i + 1) }
        END { printf "%-10s %9d runs, %6d a second, %5d edges, exit %d\n", target, runs, rate, cov, status }
        ' "$out/$target.log"
    if [ -n "${KEEP:-}" ]; then
        "$out/fuzz_$target" -merge=1 -max_len=4096 "tests/fuzz/corpus/$target" "$out/$target" >"$out/$target.merge" 2>&1
    fi
done
exit $failed
