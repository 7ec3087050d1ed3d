#!/bin/sh
# Rebuild cifar10_train.bin and cifar10_test.bin from the full CIFAR-10 (binary version).
#   sh make_sample.sh DIR [OUT]      DIR holds data_batch_1.bin ... data_batch_5.bin and test_batch.bin
# The rule does not depend on the order of the records in DIR: in ascending SHA-256 of a whole record
# (3073 bytes), take a record while its class still needs one: 100 a class for training, 29 for testing.
# Needs a POSIX shell, coreutils' sha256sum, and room for 60,000 small temporary files.
set -eu
[ $# -ge 1 ] || { echo "usage: sh make_sample.sh DIR [OUT]" >&2; exit 2; }
dir=$(cd "$1" && pwd)
out=${2:-.}
mkdir -p "$out"
out=$(cd "$out" && pwd)
tmp=$(mktemp -d "${TMPDIR:-/tmp}/cifar-sample.XXXXXX")
trap 'rm -rf "$tmp"' EXIT INT TERM

# sample NAME PER_CLASS FILES...: one file a record, sorted by hash, then picked class by class
sample() {
    name=$1 per_class=$2
    shift 2
    mkdir "$tmp/$name"
    (
        cd "$tmp/$name"
        cat "$@" | split -b 3073 -a 5 - r
        find . -name 'r*' -exec sha256sum {} + | sort | while read -r hash record; do
            label=$(od -An -tu1 -N1 "$record")
            label=$((label))
            eval "have=\${have_$label:-0}"
            [ "$have" -lt "$per_class" ] || continue
            eval "have_$label=$((have + 1))"
            taken=$((${taken:-0} + 1))
            cat "$record"
            [ "$taken" -lt $((10 * per_class)) ] || break
        done
    ) > "$tmp/$name.bin"
    [ "$(wc -c < "$tmp/$name.bin")" -eq $((10 * per_class * 3073)) ] ||
        { echo "make_sample.sh: not enough records of each class for $name" >&2; exit 1; }
    mv "$tmp/$name.bin" "$out/$name.bin"
    rm -rf "${tmp:?}/$name"
}

for f in data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 test_batch; do
    [ -f "$dir/$f.bin" ] || { echo "make_sample.sh: no $f.bin in $dir" >&2; exit 1; }
done
sample cifar10_train 100 "$dir/data_batch_1.bin" "$dir/data_batch_2.bin" "$dir/data_batch_3.bin" \
    "$dir/data_batch_4.bin" "$dir/data_batch_5.bin"
sample cifar10_test 29 "$dir/test_batch.bin"
(cd "$out" && sha256sum cifar10_train.bin cifar10_test.bin)
