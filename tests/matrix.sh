#!/bin/sh
# One small program on every kind of machine that is at hand: it trains, quantises, saves, loads and reads
# (tests/contract/compile/matrix.c), and must print one hash everywhere. A table of what it said, then the last line
# "N passed, N failed[, N skipped]": what is not installed is skipped, and says so; another hash fails.
#
#     tests/matrix.sh [TARGET...]     these alone, beside native, which all are held against (default: all)
#     tests/matrix.sh --list          their names
#     tests/matrix.sh --help
#
# JOBS=N at a time; BUILD=FOLDER, default build. Needs sh, awk and a C compiler; other processors run under qemu-user,
# Windows under wine, WebAssembly in node.
cd "$(dirname "$0")/.." || exit 1
dir=${BUILD:-build}/matrix
program=tests/contract/compile/matrix.c
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" WINEDEBUG=-all

# ---- the targets: name, what it is run with ("-": nothing), compiler and options ----
quick='-std=c99 -O1'
small="$quick -static"
targets() {
    cat <<LIST
native - ${CC:-cc} $quick
gcc-O3 - gcc -std=gnu11 -O3 -march=native -ffp-contract=fast -fopenmp
g++ - g++ -x c++ -std=c++11 -O1
$(for n in 10 11 12 13 14 15 16; do echo "gcc-$n - gcc-$n $quick"; done)
$(for n in 13 14 15 16 17 18 19 20 21 22; do echo "clang-$n - clang-$n $quick"; done)
tcc - tcc
musl - musl-gcc $small
i386 - i686-linux-gnu-gcc $small -msse2 -mfpmath=sse
i386-O0 - i686-linux-gnu-gcc -std=c99 -O0 -static -msse2 -mfpmath=sse
aarch64 qemu-aarch64 aarch64-linux-gnu-gcc $small
armhf qemu-arm arm-linux-gnueabihf-gcc $small
riscv64 qemu-riscv64 riscv64-linux-gnu-gcc $small
ppc64le qemu-ppc64le powerpc64le-linux-gnu-gcc $small
s390x qemu-s390x s390x-linux-gnu-gcc $small
windows wine x86_64-w64-mingw32-gcc $small
wasm node clang-19 --target=wasm32-wasi $quick
wasm-simd node clang-19 --target=wasm32-wasi $quick -msimd128
wasm-14 node clang-14 --target=wasm32-wasi $quick
wasm-emcc node emcc $quick -sNODERAWFS=1
LIST
}
names() { targets | awk '{ print $1 }'; }

case ${1:-} in
    --help) sed -n 's/^# \{0,1\}//p' "$0" | sed '/^---/,$d' | sed 1d; exit 0 ;;
    --list) names; exit 0 ;;
esac

# ---- one target ----
run_with() { # RUNNER PROGRAM ARGUMENTS
    with=$1
    shift
    case $with in
        -) "$@" ;;
        wine) WINEPREFIX="$PWD/$dir/wine" wine "$@" 2>/dev/null | tr -d '\r' ;;
        node)
            case $1 in
                *.js) node "$@" ;;
                *) node --no-warnings --experimental-wasi-unstable-preview1 tests/lib/wasi.mjs "$@" ;;
            esac
            ;;
        *) "$with" "$@" ;;
    esac
}
# what is built; of emcc a script
built() { case $1 in *emcc) echo "$dir/$1.js" ;; windows) echo "$dir/$1.exe" ;; *) echo "$dir/$1" ;; esac; }
version() { # COMPILER: its name and number
    number=$("$1" --version 2>/dev/null || "$1" -v)
    echo "$1 $(echo "$number" | sed 's/([^)]*)//g' | tr ' ' '\n' | grep -m 1 '^[0-9][0-9]*[.-]')"
}
one() { # NAME RUNNER COMPILER OPTION...: leaves "passed HASH SETS SECONDS", "skipped WHY" or "failed" in NAME.result
    name=$1 runner=$2
    shift 2
    out=$(built "$name")
    result=$dir/$name.result log=$dir/$name.log
    for need in "$1" ${runner#-}; do
        command -v "$need" >/dev/null 2>&1 || { echo "skipped no $need here" >"$result"; return; }
    done
    if ! "$@" "$dir/hello.c" -o "$out" >"$log" 2>&1 || [ "$(run_with "$runner" "$out" 2>>"$log")" != ok ]; then
        echo "skipped $1 makes no program that runs here" >"$result"
        return
    fi
    version "$1" >"$dir/$name.version"
    if ! "$@" -I. $program -o "$out" -lm >"$log" 2>&1; then echo failed >"$result"; return; fi
    begin=$(date +%s.%N)
    said=$(run_with "$runner" "$out" "$dir/$name.files" 2>>"$log") || { echo failed >"$result"; return; }
    echo "$said" | grep -q -E '^[0-9a-f]{16} [a-z0-9+]+$' || { echo "$said" >>"$log"; echo failed >"$result"; return; }
    echo "passed $said $(echo "$begin $(date +%s.%N)" | awk '{ printf "%.1f", $2 - $1 }')" >"$result"
}
if [ "${1:-}" = --one ]; then
    shift
    mkdir -p "$dir/$1.files"
    one "$@"
    exit 0
fi

# ---- all of them ----
mkdir -p "$dir" || exit 1
rm -rf "$dir"/*.result "$dir"/*.log "$dir"/*.files
printf '#include <stdio.h>\nint main(void) { puts("ok"); return 0; }\n' >"$dir/hello.c"
targets >"$dir/all"
if [ $# -gt 0 ]; then
    for name; do
        names | grep -q -x -e "$name" || { echo "no target $name; they are: $(names | tr '\n' ' ')" >&2; exit 1; }
    done
    echo "native $* " | tr ' ' '\n' | awk 'FILENAME == "-" { wanted[$1] = 1; next } $1 in wanted' - "$dir/all" \
        >"$dir/list"
else
    cp "$dir/all" "$dir/list"
fi
xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}" -L 1 sh tests/matrix.sh --one <"$dir/list"

# ---- the table ----
passed=0 failed=0 skipped=0
want=$(awk '$1 == "passed" { print $2 }' "$dir/native.result")
row='| %-9s | %-32s | %-15s | %-16s | %7s |\n'
printf "$row" target compiler "instruction set" hash seconds
echo '| --- | --- | --- | --- | ---: |'
while read -r name _ compiler _; do
    read -r state hash sets seconds <"$dir/$name.result" || state=failed
    [ "$state" = passed ] && [ "$hash" = "$want" ] || continue
    printf "$row" "$name" "$(cat "$dir/$name.version")" "$sets" "$hash" "$seconds"
    passed=$((passed + 1))
done <"$dir/list"
while read -r name _ compiler rest; do
    read -r state hash sets seconds <"$dir/$name.result" || state=failed
    case $state in
        skipped)
            skipped=$((skipped + 1))
            echo "skipped $name: $hash $sets $seconds"
            continue
            ;;
        passed) [ "$hash" != "$want" ] || continue ;;
    esac
    failed=$((failed + 1))
    echo "FAILED $name ($compiler $rest): ${hash:-no hash}, not ${want:-that of native, which has none}"
    tail -n 15 "$dir/$name.log"
done <"$dir/list"
echo "$passed passed, $failed failed$([ "$skipped" -eq 0 ] || echo ", $skipped skipped")"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
