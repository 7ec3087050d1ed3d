#!/bin/sh
# Short runs of build/wikitext2 on a few kilobytes of the sample: the last line's keys, the files, the same bits for any
# threads and instruction set, a training that is stopped or killed and goes on, and bad arguments. The last line is
# "N passed, N failed".
set -u
cd "$(dirname "$0")/../.." || exit 1
example=wikitext2
. tests/lib/example.sh
value() { tail -n 1 "$tmp/$1.out" | value_of "$2"; }
unequal() { [ "$1" != "$2" ]; }
less() { awk "BEGIN { exit !($1 < $2) }"; }
# The text: whole lines from the beginning of each part.
mkdir -p "$tmp/text/wikitext-2"
for part in train valid test; do
    lines=60
    [ $part = train ] || lines=12
    head -n $lines examples/data/wikitext2/wiki.$part.tokens >"$tmp/text/wikitext-2/wiki.$part.tokens"
done
tiny="--data $tmp/text --vocab 320 --width 32 --hidden 16 --layers 2 --heads 2 --length 32 --batch 4"
tiny="$tiny --lr 0.006 --dropout 0.1 --json"

run one 0 $tiny --steps 50 --threads 1
number='-\{0,1\}[0-9][0-9.e+-]*' keys='{"event":"final","system":"mixtral"'
for key in seed steps train_loss valid_perplexity test_perplexity params active_params tokens_per_s peak_share maxvio \
    dead ecology gamma_eff seconds; do
    keys="$keys,\"$key\":\($number\|null\)"
done
check "the last line has exactly these keys" \
    [ "$(tail -n 1 "$tmp/one.out" | grep -c "^$keys,\"checksum\":\"[0-9a-f]\{16\}\"}\$")" -eq 1 ]
check "standard output is wikitext2.jsonl" cmp -s "$tmp/one.out" "$tmp/one/wikitext2.jsonl"
check "its first line is the configuration" [ \
    "$(head -n 1 "$tmp/one.out" | grep -c '^{"event":"config","program":"wikitext2",.*"seed":1')" -eq 1 ]
words() { awk '{ n += NF + 1 } END { print n }' "$tmp/text/wikitext-2/wiki.$1.tokens"; }
for part in train valid test; do
    check "$part: words and one <eos> a line" grep -q "\"${part}_words\":$(words $part)," "$tmp/one.out"
done
check "it learns" less "$(value one train_loss)" 5.6
check "the loss of 50 steps has these bits" [ "$(value one train_loss)" = "4.70365511" ]
check "and so have the weights" [ "$(value one checksum)" = "4b86e2ccac7552f8" ]
check "wikitext2.html and wikitext2.svg are whole" \
    [ "$(tail -n 1 "$tmp/one/wikitext2.html") $(tail -n 1 "$tmp/one/wikitext2.svg")" = "</main></body></html> </svg>" ]
for file in config.json model.safetensors tokenizer.json training.state; do
    check "the checkpoint has $file" [ -s "$tmp/one/wikitext2/$file" ]
done
check "config.json names OLMoE's class" grep -q OlmoeForCausalLM "$tmp/one/wikitext2/config.json"
check "an epoch has a line of text" grep -q '"event":"epoch".*"sample":"[^"]' "$tmp/one.out"
check "nothing is left half-written" [ -z "$(find "$tmp/one" -name '*.part')" ]

for threads in 2 3; do
    run threads$threads 0 $tiny --steps 50 --threads $threads
    check "the same with $threads threads" [ "$(value one checksum)" = "$(value threads$threads checksum)" ]
done
for isa in scalar avx2 avx512 neon; do
    "$program" --quiet --out "$tmp/$isa" $tiny --steps 50 --isa $isa >"$tmp/$isa.out" 2>"$tmp/$isa.err" || {
        check "$isa: not there" says $isa 'does not have it'
        continue
    }
    check "the same with $isa" [ "$(value one checksum)" = "$(value $isa checksum)" ]
    check "$isa: the same perplexities" [ "$(value one test_perplexity)" = "$(value $isa test_perplexity)" ]
done
run seed 0 $tiny --steps 50 --seed 2
check "another seed is another training" unequal "$(value one checksum)" "$(value seed checksum)"
run dense 0 $tiny --steps 5 --dense
check "dense: as many active parameters, but for 7 of 8 columns of the routers" \
    [ "$(value dense active_params)" -eq $(($(value one active_params) - 2 * 32 * 7)) ]
run seeds 0 $tiny --steps 5 --seeds 2
check "two seeds: mean and deviation" grep -q '"event":"seeds","seeds":2,"valid_mean":[0-9.]*,"valid_std":[0-9.]*' \
    "$tmp/seeds.out"
run short 0 $tiny --steps 5
check "the last line is the first seed's" [ "$(value seeds checksum)" = "$(value short checksum)" ]
run untied 0 $tiny --steps 5 --untied --optimizer adamw --dropout 0 --system deepseek-v3
check "a row that OLMoE cannot say has no model folder" [ ! -e "$tmp/untied/wikitext2/model.safetensors" ]

# Stopped by a signal, killed, gone on: the same bits.
long="$tiny --steps 160 --epochs 64 --save 3"
run whole 0 $long
interrupt() { # NAME SIGNAL
    "$program" --quiet --out "$tmp/$1" $long >"$tmp/$1.first" 2>&1 &
    job=$!
    tries=0
    while [ ! -s "$tmp/$1/wikitext2/training.state" ] && [ $tries -lt 600 ]; do
        sleep 0.05
        tries=$((tries + 1))
    done
    kill -"$2" $job
    wait $job 2>/dev/null
    echo $? >"$tmp/$1.code"
}
for signal in INT TERM KILL; do
    interrupt $signal $signal
    check "$signal: it did end before its time" grep -q -x '130\|143\|137' "$tmp/$signal.code"
    run $signal 0 $long --resume
    check "$signal: it goes on to the same bits" [ "$(value whole checksum)" = "$(value $signal checksum)" ]
    check "$signal: and the same loss" [ "$(value whole train_loss)" = "$(value $signal train_loss)" ]
done
run other 2 $long --resume --lr 0.5
cp -r "$tmp/whole/wikitext2" "$tmp/cut"
mkdir -p "$tmp/damaged/wikitext2"
size=$(wc -c <"$tmp/cut/training.state")
head -c $((size - 9)) "$tmp/cut/training.state" >"$tmp/damaged/wikitext2/training.state"
run damaged 2 $long --resume
check "a state that was cut says so" says damaged 'ends too early'

run noncausal 2 $tiny --system expert-choice
check "a system that is not causal is refused" says noncausal 'sees what comes after'
run unknown 2 $tiny --system mixtrall
run set 2 $tiny --set "temprature=2"
run isa 2 $tiny --isa mmx
run optimizer 2 $tiny --optimizer sgd
run width 2 $tiny --width 40
run batch 2 $tiny --batch 4096
run nothing 2 --data "$tmp/nothing"
run diverges 1 $tiny --steps 50 --lr 9 --optimizer adamw

finish
