#!/bin/sh
# Short runs of build/mot: the last line's keys, the files, the same numbers for any threads and instruction set, and
# bad arguments. The last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/../.." || exit 1
example=mot
. tests/lib/example.sh
value() { tail -n 1 "$tmp/$1.out" | value_of "$2"; }
unequal() { [ "$1" != "$2" ]; }
less() { awk "BEGIN { exit !($1 < $2) }"; }

run one 0 --steps 150 --batch 32 --test 128 --classes 2 --threads 1 --json
keys='{"event":"final"' number='-\{0,1\}[0-9][0-9.e+-]*'
for key in stage1_loss stage2_loss stage3_loss purity end_to_end_loss no_attention_loss one_transformer_loss \
    stage2_line_fit stage2_slow_fit; do
    keys="$keys,\"$key\":$number"
done
for key in specialises linear_rate floor beats_end_to_end; do keys="$keys,\"$key\":\(true\|false\)"; done
check "the last line has exactly these keys" \
    [ "$(tail -n 1 "$tmp/one.out" | grep -c "^$keys,\"checksum\":\"[0-9a-f]\{16\}\"}\$")" -eq 1 ]
check "its losses are below that of an answer of 0" less "$(value one stage3_loss)" 0.45
check "training goes on to lower them" less "$(value one stage3_loss)" "$(value one stage1_loss)"
check "so it does end to end" less "$(value one end_to_end_loss)" 0.45
check "a purity is a share, at least that of one class" less 0.45 "$(value one purity)"
check "at most all" less "$(value one purity)" 1.000001
check "standard output is mot.jsonl" cmp -s "$tmp/one.out" "$tmp/one/mot.jsonl"
check "its first line is the configuration" [ \
    "$(head -n 1 "$tmp/one.out" | grep -c '^{"event":"config","program":"mot",.*"seed":1')" -eq 1 ]
for name in three_stages end_to_end no_attention one_transformer; do
    check "$name: 25 measurements a stage" [ "$(grep -c "\"event\":\"step\",\"run\":\"$name\"" "$tmp/one.out")" -eq 75 ]
done
check "the table goes to standard error" grep -q '^three stages ' "$tmp/one.err"
check "four claims are judged" [ "$(grep -c '^\(NOT \)\{0,1\}borne out: ' "$tmp/one.err")" -eq 4 ]
check "the verdict on the rate names both laws and what decided" grep -q \
    'linear rate: \(yes\|no\|not told\): .*e^(-c step) explains [0-9.]*%, 1 / (t0 + step) [0-9.]*%$' "$tmp/one.err"
check "mot.html and mot.svg are whole" \
    [ "$(tail -n 1 "$tmp/one/mot.html") $(tail -n 1 "$tmp/one/mot.svg")" = "</main></body></html> </svg>" ]
# the attention that is frozen in stage I is the same as none
first() { grep "\"run\":\"$1\",\"stage\":1," "$tmp/one.out" | sed 's/.*"stage"//'; }
check "stage I is the training without attention" [ "$(first three_stages)" = "$(first no_attention)" ]

few="--steps 25 --batch 16 --test 16 --lr 0.01 --json"
run auto 0 $few
run threads 0 $few --threads 3
run scalar 0 $few --isa scalar
run seed 0 $few --seed 2
check "the same with 3 threads" [ "$(tail -n 1 "$tmp/auto.out")" = "$(tail -n 1 "$tmp/threads.out")" ]
check "the same with scalar kernels" [ "$(value auto checksum)" = "$(value scalar checksum)" ]
check "another seed is another training" unequal "$(value auto checksum)" "$(value seed checksum)"

run classes 2 --classes 1
run experts 2 --experts 65
run isa 2 --isa mmx
run diverges 1 --steps 25 --test 16 --lr 1e10
check "a loss that is no number says so" grep -q 'try a smaller --lr' "$tmp/diverges.err"

finish
