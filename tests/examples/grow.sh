#!/bin/sh
# grow: the three acts on the sample, their keys and files, the same numbers for any threads and instruction set, the
# comparison, and damaged data. The last line is "N passed, N failed".
#
#     GROW_SEEDS=10 tests/examples/grow.sh     more seeds of the acts (default 1)
set -u
cd "$(dirname "$0")/../.." || exit 1
example=grow
. tests/lib/example.sh
of_act() { finals acts | grep "\"act\":\"$1\""; }
seeds=${GROW_SEEDS:-1}

# the acts
run acts 0 --seeds "$seeds" --json
check "a final line an act and seed" [ "$(count acts)" -eq $((3 * seeds)) ]
keys='"act":"[abc]","growth_events":[0-9]*,"experts":[0-9]*,"used":[0-9]*,"accuracy":[0-9.]*,"entropy":[0-9.]*'
check "the final keys" \
    [ "$(finals acts | grep -c "^{\"event\":\"final\",$keys,\"seed\":[0-9]*}\$")" -eq $((3 * seeds)) ]
keys='{"act":"[abc]","epoch":[0-9]*,"accuracy":[0-9.]*,"experts":[0-9]*,"used":[0-9]*,"entropy":[0-9.e-]*'
keys="$keys,\"utilisation\":\[[-0-9.,e]*\],\"event\":\"\(split\|\)\",\"reason\":\"[^\"]*\",\"seed\":[0-9]*}"
check "the keys of an epoch" [ "$(grep -c "^$keys\$" "$tmp/acts.out")" -eq $((3 * seeds * 16)) ]
check "standard output is grow.jsonl" cmp -s "$tmp/acts.out" "$tmp/acts/grow.jsonl"
check "the page and the picture are whole" \
    [ "$(tail -n 1 "$tmp/acts/grow.html") $(tail -n 1 "$tmp/acts/grow.svg")" = "</main></body></html> </svg>" ]
check "the story's figures stand beside" says acts '0.48 -> 1.07'

# a: growth fires at least five times, and most of the experts do nothing
of_act a | value_of growth_events | sort -n | head -n 1 >"$tmp/fires"
check "act a fires at least five times" [ "$(cat "$tmp/fires")" -ge 5 ]
of_act a | sed 's/.*"experts":\([0-9]*\),"used":\([0-9]*\).*/\1 \2/' >"$tmp/a"
check "act a leaves a quarter of its experts unused" awk '$2 * 4 > $1 * 3 { exit 1 }' "$tmp/a"
# b: the cooldown spaces the events by more than five epochs
grep '"act":"b".*"event":"split"' "$tmp/acts.out" | sed 's/.*"epoch":\([0-9]*\),.*"seed":\([0-9]*\).*/\2 \1/' >"$tmp/b"
check "act b waits for its cooldown" awk '$1 == seed && $2 - last < 6 { exit 1 } { seed = $1; last = $2 }' "$tmp/b"
# c: one event (at most two), no unused expert, the target is met: in at least 8 of 10 seeds
target=$(head -n 1 "$tmp/acts.out" | value_of target)
number='\([0-9.]*\)'
sizes="\"growth_events\":$number,\"experts\":$number,\"used\":$number"
of_act c | sed "s/.*$sizes,\"accuracy\":$number,.*/\1 \2 \3 \4/" >"$tmp/c"
check "act c: one or two events, all experts used, the target met" awk -v target="$target" '
    { good += $1 >= 1 && $1 <= 2 && $2 == $3 && $4 >= target; n++ } END { exit !(good * 10 >= n * 8) }' "$tmp/c"
check "nothing fires in the cooldown, and every event has its reason" \
    [ "$(grep '"event":"split"' "$tmp/acts.out" | grep -vc '"reason":"[^"]*split expert [0-9]*')" -eq 0 ]

# the same bits
few="--epochs 2 --hidden 4 --json"
run auto 0 $few
run scalar 0 $few --isa scalar
run threads 0 $few --threads 3
run seed 0 $few --seed 2
for name in scalar threads; do
    grep -v '"event":"config"' "$tmp/$name.out" >"$tmp/b"
    grep -v '"event":"config"' "$tmp/auto.out" >"$tmp/a"
    check "the same lines with $name" cmp -s "$tmp/a" "$tmp/b"
done
grep -v '"event":"config"' "$tmp/seed.out" >"$tmp/b"
check "other numbers with another seed" differ "$tmp/a" "$tmp/b"

# the comparison: a minute, so with more seeds only
if [ "$seeds" -gt 2 ]; then
    run compare 0 --compare --seeds 2 --epochs 14 --json
    check "a result for every strategy" [ "$(finals compare | grep -c '"strategy":"')" -eq 11 ]
    ends() { finals compare | grep "\"experts\":$1," | grep -c "\"strategy\":\"\($2\)\""; }
    check "growing ends with six experts" [ "$(ends 6 'large\|split\|split-at-once\|noise\|half\|utility')" -eq 6 ]
    check "shrinking with three" [ "$(ends 3 'small\|prune-usage\|prune-gate\|prune-reap\|merge')" -eq 5 ]
    check "one sentence on the cooldown, one on growing" \
        [ "$(grep -c 'points \[.*\]: .*\.$' "$tmp/compare.err")" -eq 2 ]
    check "its files" [ -s "$tmp/compare/grow_compare.html" ]
fi

# data
run nothing 2 --data "$tmp"
check "a folder without MNIST" says nothing 'no MNIST in'
mkdir -p "$tmp/bad"
for file in train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte; do
    printf '\000\000\010\003\000\000\000\002\000\000\000\034\000\000\000\034short' >"$tmp/bad/$file"
done
run short 2 --data "$tmp/bad"
check "a file that is cut off" says short 'train-images-idx3-ubyte: says 2 pictures'
if [ -n "${MOE_DATA:-}" ]; then
    run full 0 --data "$MOE_DATA" --epochs 2 --json
    check "all of MNIST" [ "$(head -n 1 "$tmp/full.out" | value_of train_pictures)" -eq 60000 ]
    make -s "${BUILD:-build}" >/dev/null 2>&1
    ${CC:-cc} -std=c99 -O2 examples/data/make_mnist.c -o "$tmp/make_mnist" && "$tmp/make_mnist" "$MOE_DATA" "$tmp/made"
    for set in train test; do
        check "the sample is made anew, byte for byte: $set" cmp -s "$tmp/made/mnist_$set.bin" \
            "examples/data/mnist_$set.bin"
    done
fi

# bad arguments
run epochs 2 --epochs 1000
run isa 2 --isa mmx
finish
