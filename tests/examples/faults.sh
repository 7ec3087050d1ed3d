#!/bin/sh
# What the examples say when the world fails: data cut off, a full disk, no memory, a file that is made shorter
# while it is read. Each ends with one line that names the file and the reason, and no signal. (A layer: save.c.)
# The last line is "N passed, N failed".
cd "$(dirname "$0")/../.." || exit 1
example=cifar10
. tests/lib/example.sh
short="--steps 1 --batch 8 --eval 8 --no-dense"

# ---- CIFAR-10's official files have 10,000 records each: here of zeros, which are airplanes ----
mkdir "$tmp/data"
batch() { truncate -s "$2" "$tmp/data/$1.bin"; } # FILE BYTES
for i in 1 2 3 4 5; do batch data_batch_$i 30730000; done
batch test_batch 30730000
refuses() { # WHAT FILE MESSAGE
    # shellcheck disable=SC2086
    run cut 2 --data "$tmp/data" $short
    check "$1: the file is named" says cut "^error: .*/$2"
    check "$1: and the reason" says cut "$3"
}
batch data_batch_2 0
refuses "an empty batch" data_batch_2.bin "holds 0 records of 3073 bytes, not 10000"
batch data_batch_2 30726927
refuses "a batch that lacks a record" data_batch_2.bin "holds 9999 records"
batch data_batch_2 30730001
refuses "a batch with a byte more" data_batch_2.bin "not a multiple of 3073"
batch data_batch_2 30733073
refuses "a batch with a record more" data_batch_2.bin "holds 10001 records"
batch data_batch_2 30730000
rm "$tmp/data/data_batch_3.bin"
refuses "a batch that is not there" data_batch_3.bin "No such file"
batch data_batch_3 30730000
batch test_batch 3073
refuses "a test batch of one record" test_batch.bin "holds 1 records"
batch data_batch_1 0
refuses "an empty first batch" data_batch_1.bin "holds 0 records"
rm -rf "$tmp/data"

# ---- no room on the disk, no memory ----
if [ -w /dev/full ]; then
    mkdir "$tmp/full"
    ln -s /dev/full "$tmp/full/cifar10.jsonl"
    # shellcheck disable=SC2086
    run full 1 $short
    check "a full disk: the file is named" says full "^error: .*cifar10.jsonl"
    check "a full disk: and the reason" says full "No space left on device"
fi
little() { # as `run`, with so many KB of addresses
    # shellcheck disable=SC2086
    (ulimit -v "$1" && "$program" --quiet --threads 1 --out "$tmp/little" $short) >"$tmp/little.out" 2>"$tmp/little.err"
    status=$?
}
if (ulimit -v 400000) 2>/dev/null; then
    enough=0 refused=0
    for room in 4000 6000 8000 12000 16000 24000 32000 64000 128000 400000; do
        little $room
        case $status in
            0) enough=$((enough + 1)) ;;
            1 | 2)
                check "$room KB: one line says so" grep -q -i -e 'memory' "$tmp/little.err"
                refused=$((refused + 1))
                ;;
            127) ;; # the program itself does not fit
            *) check "$room KB: no signal, but exit $status" false ;;
        esac
    done
    check "some are enough" [ $enough -ge 1 ]
    check "some are not" [ $refused -ge 1 ]
fi

# ---- a file that is made shorter while it is mapped ----
cat >"$tmp/view.c" <<'END'
#include "examples/common/platform.h"
int main(int argc, char **argv) {
    size_t size;
    const char *bytes = argc == 3 ? file_view(argv[1], &size) : NULL;
    if (!bytes || size != 65536) die("no view");
    if (truncate(argv[1], atoi(argv[2]))) die("truncate: %s", strerror(errno));
    unsigned sum = 0;
    for (size_t i = 0; i < size; i++) sum += (unsigned char)bytes[i];
    printf("%u\n", sum);
    return 0;
}
END
check "a reader of a mapped file" $cc -std=c99 -Wall -Wextra -Werror -I. "$tmp/view.c" -o "$tmp/view"
shorter() { # SIZE: the exit status of the reader
    truncate -s 65536 "$tmp/mapped.bin"
    "$tmp/view" "$tmp/mapped.bin" "$1" >"$tmp/shorter.out" 2>"$tmp/shorter.err"
    status=$?
}
shorter 65536
check "as long as it was" [ $status -eq 0 ]
shorter 100
check "made shorter: exit $status, not 2" [ $status -eq 2 ]
check "made shorter: one line" [ "$(wc -l <"$tmp/shorter.err")" -eq 1 ]
check "made shorter: the file is named" says shorter "^error: $tmp/mapped.bin: was made shorter while it was read"
finish
