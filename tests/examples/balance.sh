#!/bin/sh
# Runs a very short balance of every method and holds its results against what it promises: a result for each loss, each
# controller and each balanced routing, exactly these keys, the files, the same numbers for any threads; that the
# network
# collapses and comes back; the coefficients of a sweep; bad arguments. The last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/../.." || exit 1
example=balance
. tests/lib/example.sh
value() { finals "$1" | grep "\"method\":\"$2\"" | value_of "$3"; } # value RUN METHOD KEY

# every method: the names are those of the tables in docs/math.md, which another test holds against the library
run all 0 --steps 2 --images 100 --threads 1 --json
names() { # names HEADING: the first column of that table, without latent-kl, which no layer can have
    awk -v heading="$1" 'index($0, heading) == 1 { on = 1; next }
        on && !/^\|/ { exit }
        on && /^\| `/ { print $2 }' docs/math.md |
        tr -d '`' | grep -v '^latent-kl$'
}
of_kind() { finals all | sed -n "s/.*\"method\":\"\([^\"]*\)\",\"kind\":\"$1\".*/\1/p"; }
names '| loss | value |' >"$tmp/losses"
names '| controller | update |' >"$tmp/controllers"
of_kind loss >"$tmp/loss-results"
of_kind controller >"$tmp/controller-results"
check "the tables were read" [ "$(wc -l <"$tmp/losses")" -gt 20 ]
check "a result for every loss: $(diff "$tmp/losses" "$tmp/loss-results")" cmp -s "$tmp/losses" "$tmp/loss-results"
check "and for every controller: $(diff "$tmp/controllers" "$tmp/controller-results")" \
    cmp -s "$tmp/controllers" "$tmp/controller-results"
check "by construction" [ "$(of_kind by-construction | tr '\n' ' ')" = 'base sinkhorn expert-choice hash ' ]
check "the two ends" [ "$(of_kind none | tr '\n' ' ')" = 'unbalanced random ' ]
n=$(count all)
check "each once" [ "$n" -eq "$(finals all | sed 's/.*"method":"\([^"]*\)".*/\1/' | sort -u | wc -l)" ]
number='-\{0,1\}[0-9][0-9.e+-]*'
keys='{"event":"final","method":"[^"]*","kind":"[a-z-]*","coef":\(null\|'$number'\)'
for key in test_loss test_accuracy maxvio load_cv; do keys="$keys,\"$key\":$number"; done
keys="$keys,\"dead\":[0-9]*,\"dead_experts\":\[[0-9,]*\],\"dead_first\":[0-9]*"
keys="$keys,\"train_maxvio\":$number,\"note\":\"[^\"]*\""
check "exactly these keys, and numbers" [ "$n" -eq "$(finals all | grep -c "^$keys}\$")" ]
check "a layer of the configuration for each" [ "$(head -n 1 "$tmp/all.out" | grep -o '"d_model":' | wc -l)" -eq "$n" ]

noted() { finals all | grep '"note":"balanced in training only' | sed 's/.*"method":"\([^"]*\)".*/\1/' | tr '\n' ' '; }
check "a note where training and test route differently" [ "$(noted)" = 'base sinkhorn ' ]
check "also in the table" says all '^sinkhorn .*balanced in training only: the test takes the highest score$'

# the files
check "standard output is balance.jsonl" cmp -s "$tmp/all.out" "$tmp/all/balance.jsonl"
check "its first line is the configuration" \
    [ "$(head -n 1 "$tmp/all.out" |
        grep -c '^{"event":"config","program":"balance",.*"seed":1,.*"steps":2,.*}$')" -eq 1 ]
check "the table goes to standard error" says all '^method .*test loss'
missing=
for method in $(finals all | sed 's/.*"method":"\([^"]*\)".*/\1/'); do
    for file in balance.html balance.svg; do
        grep -q ">$method</t" "$tmp/all/$file" || missing="$missing $file:$method"
    done
    says all "^$method " || missing="$missing terminal:$method"
done
check "every method in table and picture:$missing" [ -z "$missing" ]
check "a point for each, and the legend" [ "$(grep -c '<circle' "$tmp/all/balance.svg")" -eq $((n + 4)) ]
check "balance.html and balance.svg are whole" \
    [ "$(tail -n 1 "$tmp/all/balance.html") $(tail -n 1 "$tmp/all/balance.svg")" = "</main></body></html> </svg>" ]
run threads 0 --steps 2 --images 100 --threads 3 --json
finals all >"$tmp/a"
finals threads >"$tmp/b"
check "the same results for 1 and 3 threads" cmp -s "$tmp/a" "$tmp/b"

# the network collapses, and what balances brings it back
run some 0 --method unbalanced,z,switch,id,expert-choice,random --steps 60 --images 200 --json
check "only what was asked for" [ "$(count some)" -eq 6 ]
for method in unbalanced z; do
    check "$method: collapsed" awk -v v="$(value some $method maxvio)" -v d="$(value some $method dead)" \
        'BEGIN { exit !(v > 6 && d == 7) }'
done
for method in switch id expert-choice random; do
    check "$method: balanced" awk -v v="$(value some $method maxvio)" 'BEGIN { exit !(v < 2.5) }'
done
run seed 0 --method unbalanced,z,switch,id,expert-choice,random --steps 60 --images 200 --seed 2 --json
finals some >"$tmp/a"
finals seed >"$tmp/b"
check "another seed, other results" differ "$tmp/a" "$tmp/b"

# a sweep
run sweep 0 --sweep --method random,switch,relu-lambda,quantile --steps 2 --images 100 --json
coefficients() { value sweep "$1" coef | tr '\n' ' '; }
check "five coefficients, over four decades" [ "$(coefficients switch)" = '0.001 0.01 0.1 1 10 ' ]
check "a factor's excess over 1" [ "$(coefficients relu-lambda)" = '1.002 1.02 1.2 3 21 ' ]
check "what has no coefficient: once" [ "$(coefficients random)$(coefficients quantile)" = 'null null ' ]
check "a curve for each" [ "$(grep -c 'font-weight="600">\(switch\|relu-lambda\)</text>' "$tmp/sweep/balance.svg")" \
    -eq 2 ]

# shapes and bad arguments
run shape 0 --method switch,bias --experts 4 --top-k 2 --steps 2 --images 50 --json
check "--experts, --top-k" [ "$(head -n 1 "$tmp/shape.out" | grep -o '"n_experts":4,"top_k":2' | wc -l)" -eq 2 ]
run unknown 2 --method switch,zzz
check "an unknown method: the names" says unknown "'zzz'.* switch,.* hash"
run empty 2 --method switch,
run uneven 2 --method rank --experts 6
check "what does not fit names the method" says uneven '^balance: rank: '
run isa 2 --isa mmx
check "nothing is written then" [ ! -e "$tmp/unknown" ]

finish
