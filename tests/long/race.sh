#!/bin/sh
# tests/contract/race.c under the thread sanitizer: no two threads may touch the same memory, one of them writing,
# without a lock between. Needs gcc (or CC) with -fsanitize=thread. The last line is "N passed, N failed[, N skipped]".
cd "$(dirname "$0")/../.." || exit 1
cc=${CC:-gcc} dir=${BUILD:-build}/race
mkdir -p "$dir" || exit 1
echo 'int main(void) { return 0; }' >"$dir/hello.c"
fixed= # the sanitizer cannot live with every place that a random layout gives memory
if setarch -R true 2>/dev/null; then fixed='setarch -R'; fi
if ! "$cc" -fsanitize=thread "$dir/hello.c" -o "$dir/hello" 2>/dev/null || ! $fixed "$dir/hello" 2>/dev/null; then
    echo "skipped race: $cc makes no program with -fsanitize=thread that runs here"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
"$cc" -std=c99 -O1 -g1 -fsanitize=thread -pthread -I. -Itests/lib tests/contract/race.c tests/lib/moe.c -o "$dir/race" \
    -lm || exit 1
TSAN_OPTIONS='exitcode=66 halt_on_error=0' $fixed "$dir/race" >"$dir/log" 2>&1
code=$?
if grep -q 'unexpected memory mapping' "$dir/log"; then
    echo "skipped race: the sanitizer finds no room in this machine's layout of memory"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
races=$(grep -c 'WARNING: ThreadSanitizer' "$dir/log")
grep -v '^=*$' "$dir/log" | head -n 40
[ "$races" -eq 0 ] && [ "$code" -ne 66 ] && exit "$code"
echo "$races races"
echo "0 passed, 1 failed"
exit 1
