#!/bin/sh
# Runs a very short zoo of every system and holds its results against what it promises: the keys of a result, their
# order,
# the files, the same numbers for any threads and instruction set, systems that diverge, and bad arguments.
# The last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/../.." || exit 1
example=zoo
. tests/lib/example.sh
untimed() { finals "$1" | sed 's/"tokens_per_s":[^,]*,//'; }

# every system
run all 0 --steps 2 --images 100 --threads 1 --json
n=$(count all)
check "several systems" [ "$n" -ge 4 ]
check "a result for every layer of the configuration" \
    [ "$n" -eq "$(head -n 1 "$tmp/all.out" | grep -o '"d_model":' | wc -l)" ]
check "a result for each name" [ "$n" -eq "$(finals all | sed 's/.*"system":"\([^"]*\)".*/\1/' | sort -u | wc -l)" ]
number='\(null\|-\{0,1\}[0-9][0-9.e+-]*\)' keys='{"event":"final","system":"[^"]*","source":"[^"]*"'
for key in seed train_loss test_loss test_accuracy params active_params active_measured start_output start_p_max \
    tokens_per_s maxvio load_cv load_entropy dead dead_experts dead_first dropped experts_per_token pes; do
    keys="$keys,\"$key\":$number"
    [ $key = dead_experts ] && keys="${keys%"$number"}\[[0-9,]*\]"
done
check "exactly these keys" \
    [ "$n" -eq "$(finals all | grep -c "^$keys,\"diverged\":\(true\|false\),\"notes\":\[.*\]}\$")" ]
check "two steps, and nothing diverges" [ "$(finals all | grep -c '"diverged":false,')" -eq "$n" ]

# what is compared is alike, or a note says that it is not
pick() { sed "s/.*\"system\":\"\([^\"]*\)\".*\"$1\":\([^,]*\),.*/\1 \2/"; }
finals all | pick active_params >"$tmp/active"
dense=$(sed -n 's/^dense //p' "$tmp/active")
check "as many active parameters as dense, to 5%" awk -v dense="$dense" '
    { if ($2 < 0.95 * dense || $2 > 1.05 * dense) { print; bad = 1 } } END { exit bad || dense < 1000 }' "$tmp/active"
# where tokens choose how many experts they take, what they took is counted: 8 experts are nearly all parameters
finals all | sed 's/.*"system":"\([^"]*\)".*"params":\([^,]*\),"active_params":\([^,]*\),"active_measured":/\1 \2 \3 /
    s/,.*"experts_per_token":\([^,]*\),.*/ \1/' >"$tmp/measured"
check "active parameters as the tokens chose" awk '
    $1 == "dense" || $1 == "switch" { n++; if ($4 != $3) { print; bad = 1 } }
    $1 == "dynmoe" || $1 == "remoe" { n++; each = ($4 - $3) / ($5 - 2)
        if ($5 < 2.1 || $2 - 8 * each < 0 || $2 - 8 * each > 0.05 * $2) { print; bad = 1 } }
    $1 == "moe++" { n++; if ($4 >= $3) { print; bad = 1 } }
    END { exit bad || n != 5 }' "$tmp/measured"
keys='"systems":[0-9]*,"active_params_correlation":[-0-9.e]*,"active_measured_correlation":[-0-9.e]*,'
check "and whether they explain the losses" grep -q "^{\"event\":\"fairness\",$keys" "$tmp/all.out"
finals all | grep -v '"notes":\[.*output at the start' | pick start_output >"$tmp/output"
dense=$(sed -n 's/^dense //p' "$tmp/output")
check "an output as large as dense's at the start, or a note" awk -v dense="$dense" '
    { if ($2 < 0.9 * dense || $2 > 1.1 * dense) { print; bad = 1 } } END { exit bad || NR < 24 || dense <= 0 }' \
    "$tmp/output"
saturated() { finals "$1" | grep 'router saturated' | sed 's/.*"system":"\([^"]*\)".*/\1/' | tr '\n' ' '; }
check "no router begins saturated" [ -z "$(saturated all)" ]
mismatch=$(finals all | grep 'balanced over the batch in training only' | sed 's/.*"system":"\([^"]*\)".*/\1/' | sort |
    tr '\n' ' ')
check "training and test that route differently are noted" [ "$mismatch" = 'base sinkhorn ' ]
run asis 0 --as-is --system dense,soft-moe,smear,switch --steps 2 --images 100 --threads 1 --json
check "--as-is: the rows' own sizes" \
    [ "$(finals asis | pick active_params | sort | tr '\n' ' ')" = \
        'dense 13002 smear 7314 soft-moe 50315 switch 5258 ' ]
check "--as-is: smear begins saturated, and says so" [ "$(saturated asis)" = 'smear ' ]

# seeds: the first is what --seed gives; mean and deviation by hand
run seeds 0 --seeds 3 --system dense,switch --steps 4 --images 100 --threads 1 --json
run one 0 --seed 2 --system dense,switch --steps 4 --images 100 --threads 1 --json
check "three results a system" [ "$(count seeds)" -eq 6 ]
spread=$(finals seeds | grep '"system":"switch"' | sed 's/.*"test_loss":\([^,]*\),.*/\1/' |
    awk '{ v[NR] = $1; s += $1 } END { m = s / NR; for (i in v) d += (v[i] - m) ^ 2
        printf "%.6f %.6f", m, sqrt(d / (NR - 1)) }')
printed=$(grep '^{"event":"seeds","system":"switch","seeds":3,"test_loss_mean"' "$tmp/seeds.out" |
    sed 's/.*"test_loss_mean":\([^,]*\),"test_loss_sd":\([^,]*\),.*/\1 \2/' | awk '{ printf "%.6f %.6f", $1, $2 }')
check "mean and deviation: $printed, by hand $spread" [ "$printed" = "$spread" ]
check "and in the table" says seeds '^switch .* +- '
check "seeds differ" [ "$(finals seeds | sed 's/.*"test_loss":\([^,]*\),.*/\1/' | sort -u | wc -l)" -eq 6 ]
finals all | sed 's/.*"test_loss":\([^,]*\).*/\1/' >"$tmp/losses"
check "every test loss is that of a beginner" awk '!($1 > 1.5 && $1 < 3.5) { exit 1 }' "$tmp/losses"
sort -g "$tmp/losses" >"$tmp/sorted"
check "sorted by test loss" cmp -s "$tmp/losses" "$tmp/sorted"
finals all |
    sed 's/.*"test_accuracy":\([^,]*\),.*"load_entropy":\([^,]*\),.*"dropped":\([^,]*\),.*/\1\n\2\n\3/' >"$tmp/shares"
check "accuracy, entropy and dropped share are shares" awk '!($1 == "null" || ($1 >= 0 && $1 <= 1.000001)) { exit 1 }' \
    "$tmp/shares"

# the files
check "standard output is zoo.jsonl" cmp -s "$tmp/all.out" "$tmp/all/zoo.jsonl"
check "its first line is the configuration" \
    [ "$(head -n 1 "$tmp/all/zoo.jsonl" | grep -c '^{"event":"config",.*"seed":1,.*"steps":2,.*}$')" -eq 1 ]
check "its last line is a result" [ "$(tail -n 1 "$tmp/all/zoo.jsonl" | grep -c '^{"event":"final"')" -eq 1 ]
check "the table goes to standard error" says all '^system .*test loss'
missing=
for system in $(finals all | sed 's/.*"system":"\([^"]*\)".*/\1/'); do
    grep -q "<td>$system</td>" "$tmp/all/zoo.html" || missing="$missing table:$system"
    for file in zoo.html zoo.svg; do
        grep -q "font-weight=\"600\">$system</text>" "$tmp/all/$file" || missing="$missing $file:$system"
    done
    says all "^$system " || missing="$missing terminal:$system"
done
check "every system in the tables and pictures:$missing" [ -z "$missing" ]
check "zoo.html and zoo.svg are whole" \
    [ "$(tail -n 1 "$tmp/all/zoo.html") $(tail -n 1 "$tmp/all/zoo.svg")" = "</main></body></html> </svg>" ]

# the windows of a training: 24 lines, each of its share of the steps and of all of their batches
windows() { # NAME SYSTEM TOTAL
    grep "\"event\":\"step\",\"system\":\"$2\"" "$tmp/$1.out" |
        sed 's/.*"step":\([0-9]*\),"batches":\([0-9]*\),.*/\1 \2/' | awk -v total="$3" '
        { share = $1 - last; last = $1; n++
          if ($2 != share || share < int(total / 24) || share > int((total + 23) / 24)) { print; bad = 1 } }
        END { exit bad || n != (total < 24 ? total : 24) || last != total }'
}
run windows 0 --system dense,switch --steps 100 --epochs 50 --images 100 --batch 5 --json
check "24 windows in 100 steps" windows windows switch 100
check "of one expert too" windows windows dense 100
run even 0 --system switch --steps 48 --epochs 50 --images 100 --batch 5 --json
check "24 windows in 48 steps" windows even switch 48
run short 0 --system switch --steps 7 --images 100 --batch 5 --json
check "7 windows in 7 steps" windows short switch 7

# the same numbers
run threads 0 --steps 2 --images 100 --threads 3 --json
untimed all >"$tmp/a"
untimed threads >"$tmp/b"
check "the same results for 1 and 3 threads" cmp -s "$tmp/a" "$tmp/b"
few="--system switch,dense --steps 2 --images 25 --batch 5 --json"
run auto 0 $few
run scalar 0 $few --isa scalar
run seed 0 $few --seed 2
for name in auto scalar seed; do untimed $name >"$tmp/$name.final"; done
check "the same results with scalar kernels" cmp -s "$tmp/auto.final" "$tmp/scalar.final"
check "other results with another seed" differ "$tmp/auto.final" "$tmp/seed.final"

# learning, choosing, shapes
run some 0 --system switch,dense --steps 80 --images 100 --batch 25 --experts 4 --json
check "only what was asked for" [ "$(count some)" -eq 2 ]
check "--experts: four for switch, one for dense" \
    [ "$(head -n 1 "$tmp/some.out" | grep -o '"n_experts":[0-9]*' | sort | tr '\n' ' ')" = \
        '"n_experts":1 "n_experts":4 ' ]
finals some | sed 's/.*"train_loss":\([^,]*\).*/\1/' >"$tmp/learned"
check "80 steps learn these images" awk '$1 > 2 { exit 1 }' "$tmp/learned"
run markdown 0 --system dense,switch --steps 2 --images 50 --markdown
check "a table in Markdown" [ "$(grep -c '^|.*|$' "$tmp/markdown.out")" -eq 5 ] # heading, line, two, no mixture

# numbers that leave their range
run diverged 0 --system dense,switch --steps 30 --images 100 --lr 1e20 --json
check "both diverge, and are reported" [ \
    "$(finals diverged | grep -c '"test_loss":null,.*"pes":null,"diverged":true,')" -eq 2 ]
check "the files of a diverged zoo" [ -s "$tmp/diverged/zoo.html" ]

# bad arguments
run unknown 2 --system swich
check "an unknown system: near names" says unknown "'swich'.*switch"
run second 2 --system dense,nope
check "an unknown system among known ones" says second "'nope'"
run empty 2 --system dense,
run shape 2 --system switch --experts 2 --top-k 3
check "a shape that does not fit names the system" says shape 'switch: top_k'
run uneven 2 --system dense,base --experts 3 --images 50
check "what a system cannot do with a batch is known at the beginning" says uneven 'base: n_tokens'
run isa 2 --isa mmx
check "nothing is written then" [ ! -e "$tmp/unknown" ]
check "nor for a bad shape" [ ! -e "$tmp/shape" ]
check "nor for a batch that does not fit" [ ! -e "$tmp/uneven" ]

finish
