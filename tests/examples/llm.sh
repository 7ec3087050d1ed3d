#!/bin/sh
# examples/llm: token ids and messages on files made here; with MOE_MODELS=DIR (small checkpoints in their public
# layout, with what the original code computed) every model there: experts equal, logits and router logits near, the
# greedy continuation equal, the same bits for every batch and number of threads; and what it says of damaged files.
cd "$(dirname "$0")/../.." || exit 1
program=${BUILD:-build}/llm
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
suite=llm
. tests/lib/check.sh
[ -x "$program" ] || make -s "$program" || exit 1
limit=
command -v timeout >/dev/null 2>&1 && limit="timeout 60"
llm() { $limit "$program" --quiet --threads 1 "$@"; }
same() { [ "$1" = "$2" ] || { printf '%s\nnot\n%s\n' "$1" "$2" && false; }; }
# refuses STATUS WORDS ARGUMENTS...: the exit status, and one line on standard error with all the words
refuses() {
    want=$1 words=$2
    shift 2
    llm "$@" >"$tmp/out" 2>"$tmp/err"
    [ $? -eq "$want" ] || return 1
    [ "$(wc -l <"$tmp/err")" -eq 1 ] || return 1
    for word in $words; do grep -q -e "$word" "$tmp/err" || { cat "$tmp/err" && return 1; }; done
}

# ---- a tokenizer of our own ----
own=$tmp/own
mkdir "$own"
: >"$tmp/empty"
cat >"$own/tokenizer.json" <<'END'
{"added_tokens":[{"id":5,"content":"<s>","special":true}],"normalizer":null,
 "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false},"decoder":{"type":"ByteLevel"},"post_processor":null,
 "model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2,"\u0120":3,"\u0120ab":4},"merges":["a b","\u0120 ab"]}}
END
check "ids" same "$(llm --model "$own" --encode 'ab ab<s>b' --json)" '{"ids":[2,4,5,1]}'
check "ids as a list" same "$(llm --model "$own" --encode 'ab ab')" 2,4
check "text" same "$(llm --model "$own" --decode 2,4,5)" 'ab ab<s>'
damaged() { # WORDS SED-COMMAND: the tokenizer with a change
    mkdir -p "$tmp/bad"
    sed "$2" "$own/tokenizer.json" >"$tmp/bad/tokenizer.json"
    refuses 2 "bad/tokenizer.json $1" --model "$tmp/bad" --encode ab
}
check "an unknown step" damaged 'pre_tokenizer.type Unigrams' 's/"ByteLevel","add/"Unigrams","add/'
check "a merge of nothing" damaged 'merges.0 vocab' 's/"a b"/"a c"/'
check "a merge of three" damaged 'merges.0' 's/"a b"/"a b b"/'
check "the same id twice" damaged 'same id' 's/"b":1/"b":0/'
check "an id that is none" damaged 'vocab id' 's/"b":1/"b":-1/'
check "no vocabulary" damaged 'vocab missing' 's/"vocab"/"vocal"/'
check "an added token's id" damaged 'id number' 's/"id":5/"id":"5"/'
check "another model" damaged 'type Unigram' 's/"BPE"/"Unigram"/'
check "no JSON" damaged 'byte' 's/"merges":/"merges"/'
printf '{"added_tok' >"$tmp/bad/tokenizer.json"
check "a file cut off" refuses 2 'bad/tokenizer.json byte' --model "$tmp/bad" --encode ab
check "no UTF-8" refuses 2 'UTF-8' --model "$own" --encode "$(printf 'a\377')"
# ---- the checkpoint that the repository carries ----
carried=examples/data/wikitext2/model
text=$tmp/text
head -c 9000 examples/data/wikitext2/wiki.test.tokens >"$text"
check "it runs without arguments" sh -c "'$program' --quiet --out '$tmp/plain' >'$tmp/plain.out'"
check "and goes on from a sentence of the sample" \
    grep -q '^ Robert <unk> is an English film .* actor \. [A-Z]' "$tmp/plain.out"
head -n 1 "$tmp/plain/llm.jsonl" >"$tmp/first"
tail -n 1 "$tmp/plain/llm.jsonl" >"$tmp/last"
check "llm.jsonl: first the configuration" \
    grep -q '^{"event":"config","program":"llm",.*"experts":8,"top_k":2,' "$tmp/first"
check "and the end" grep -q '^{"event":"final","ids":\[[0-9,]*\],"text":".*"bytes_per_token":' "$tmp/last"
small() { [ "$(cat $carried/* | wc -c)" -lt 1500000 ]; }
check "it is small" small
llm --model $carried --text "$text" --format all --json --out "$tmp/all" >"$tmp/all.out" 2>/dev/null
ratio() { # FORMAT LEAST MOST: perplexity over that of f32
    awk -v f="$1" -v lo="$2" -v hi="$3" '{ split($0, a, /"perplexity":/); p = a[2] + 0 } /"format":"f32"/ { one = p }
        $0 ~ "\"event\":\"format\",\"format\":\"" f "\"" { r = p / one; print f, r; ok = r >= lo && r <= hi }
        END { exit !ok }' "$tmp/all.out"
}
check "bf16 loses nothing: the file is bf16" ratio bf16 1 1
check "int8 within 0.5%" ratio int8 0.995 1.005
check "int4 within 3%" ratio int4 0.97 1.03
nats() { llm --model $carried --text "$text" --json --out "$tmp/one" "$@" 2>/dev/null | sed -n '$s/.*"nats"/"nats"/p'; }
check "one format alone is the same" grep -q "\"format\":\"int8\".*$(nats --format int8)" "$tmp/all.out"
check "perplexity by threads and batch" grep -q "\"format\":\"f32\".*$(nats --threads 2 --batch 9)" "$tmp/all.out"

# ---- recorded and replayed ----
ids=$(llm --model $carried --encode "$(head -c 500 "$text")")
run() { # NAME ARGUMENTS...
    name=$1
    shift
    llm --model $carried --ids "$ids" --dump "$tmp/$name" "$@"
}
check "recorded" run first --record "$tmp/routing"
check "replayed" run again --replay "$tmp/routing" --batch 7 --threads 2 --record "$tmp/routing2"
check "the same logits" cmp "$tmp/first.logits.npy" "$tmp/again.logits.npy"
check "the same experts" cmp "$tmp/first.experts.npy" "$tmp/again.experts.npy"
check "and again the same record" cmp "$tmp/routing" "$tmp/routing2"
check "no logits of routers that did not decide" [ ! -e "$tmp/again.router_logits.npy" ]
check "recording changes nothing" run without
check "the same logits without" cmp "$tmp/first.logits.npy" "$tmp/without.logits.npy"
run small --format int4
run int4 --format int4 --replay "$tmp/routing"
differ() { ! cmp -s "$1" "$2"; }
check "another format has other logits" differ "$tmp/small.logits.npy" "$tmp/first.logits.npy"
check "and others with the routing of f32" differ "$tmp/small.logits.npy" "$tmp/int4.logits.npy"
check "whose experts are those of f32" cmp "$tmp/first.experts.npy" "$tmp/int4.experts.npy"
written=$(llm --model $carried --prompt 'In the' --tokens 9 --out "$tmp/o" --record "$tmp/talk")
check "what is written on is replayed" same "$written" \
    "$(llm --model $carried --prompt 'In the' --tokens 9 --out "$tmp/o" --replay "$tmp/talk")"
windows() { nats --context 64 --stride 48 "$@"; }
check "and a text in windows" same "$(windows --record "$tmp/read")" "$(windows --replay "$tmp/read" --batch 5)"
damage() { # WORDS: the record in $tmp/torn is refused
    refuses 2 "torn $1" --model $carried --ids "$ids" --dump "$tmp/x" --replay "$tmp/torn"
}
change() { LC_ALL=C sed "$1" "$tmp/routing" >"$tmp/torn"; }
put() { # OFFSET BYTES: from the record's end
    cp "$tmp/routing" "$tmp/torn"
    printf "$2" | dd of="$tmp/torn" bs=1 seek=$(($(wc -c <"$tmp/routing") - $1)) conv=notrunc 2>/dev/null
}
size=$(wc -c <"$tmp/routing")
for cut in 0 5 8 40 300 420 500 $((size / 2)) $((size - 1)); do
    head -c $cut "$tmp/routing" >"$tmp/torn"
    check "a record cut off at $cut" damage 'byte'
done
change 's/"ids"/"idz"/'; check "a record without ids" damage 'ids'
change 's/"weights"/"weighty"/'; check "without weights" damage 'byte\|weights'
change 's/"I32"/"F32"/'; check "ids of another type" damage 'ids F32'
change 's/"F32"/"I32"/'; check "weights of another type" damage 'weights I32'
change 's/"experts":"8"/"experts":"9"/'; check "experts of another number" damage '__metadata__.experts 9 8'
change 's/"experts":"8"/"experts":"x"/'; check "experts that are no number" damage '__metadata__.experts x'
change 's/"experts":"8"/"experts":"1"/'; check "an expert past the end" damage 'experts element'
put 4 '\000\000\300\177'; check "a weight that is NaN" damage 'weights NaN'
half=$((($(echo "$ids" | tr , '\n' | wc -l)) * 16)) # bytes of the weights
put $((half + 4)) '\011\000\000\000'; check "a choice past the experts" damage 'experts element 9'
put $((half + 8)) '\001\000\000\000\001\000\000\000'; check "an expert twice" damage 'experts twice'
replays() { # WORDS IDS FILE
    refuses 2 "$1" --model $carried --ids "$2" --dump "$tmp/x" --replay "$tmp/$3"
}
check "other tokens" replays 'routing ids token 0' "1,$ids" routing
check "fewer tokens" replays 'routing ids only' "${ids%,*}" routing
check "more tokens" replays 'routing ids' "$ids,5" routing
check "no such record" replays 'nowhere' "$ids" nowhere

# ---- how it routes ----
sed -n '20,60p' docs/gamma.md >"$tmp/other"
llm --model $carried --inspect --text "$text" "$tmp/other" --bootstrap 50 --out "$tmp/look" --json >"$tmp/look.out" \
    2>"$tmp/look.txt"
check "inspect: it ends" grep -q '^{"event":"final","tokens":[0-9]*,"gamma_eff":' "$tmp/look.out"
for file in llm.html llm.csv llm.experts.csv llm.tokens.csv llm.jsonl llm.router_logits.npy llm.experts.npy; do
    check "inspect: $file" [ -s "$tmp/look/$file" ]
done
check "llm.jsonl is standard output" cmp "$tmp/look.out" "$tmp/look/llm.jsonl"
check "the page is whole" same "$(tail -n 1 "$tmp/look/llm.html")" '</main></body></html>'
layers() { grep '^{"layer"' "$1"; }
[ -x "${program%llm}inspect" ] || make -s "${program%llm}inspect"
"${program%llm}inspect" --quiet --bootstrap 50 --json --logits "$tmp/look/llm.router_logits.npy" \
    --indices "$tmp/look/llm.experts.npy" --labels "$tmp/look/llm.labels.npy" >"$tmp/same.out" 2>/dev/null
layers "$tmp/look.out" >"$tmp/a" && layers "$tmp/same.out" >"$tmp/b"
check "the layers are build/inspect's on its files" cmp "$tmp/a" "$tmp/b"
check "there are two" same "$(wc -l <"$tmp/a" | tr -d ' ')" 2
tokens() { awk -F '"tokens":' '/"event":"final"/ { print $2 + 0 }' "$tmp/look.out"; }
count() { llm --model $carried --encode "$(cat "$1"; echo .)" | tr , '\n' | wc -l; }
check "every token is read once" [ $(($(tokens) - $(count "$text") - $(count "$tmp/other"))) -ge -4 ]
saliency() { grep -c '"event":"saliency","layer":[01],"saliency":\[[0-9.,e-]*\]' "$tmp/look.out"; }
check "saliency of both layers" same "$(saliency)" 2
llm --model $carried --inspect --text "$text" "$tmp/other" --bootstrap 0 --out "$tmp/o" --json --batch 5 \
    >"$tmp/small.out" 2>/dev/null
values() { sed -n '/"saliency",/s/.*\[\(.*\)\].*/\1/p' "$1" | tr , '\n'; }
values "$tmp/look.out" >"$tmp/a" && values "$tmp/small.out" >"$tmp/b"
near() {
    paste "$1" "$2" | awk '{ n++; d = $1 / $2 - 1; if (d > 1e-6 || d < -1e-6) bad++ } END { exit bad > 0 || n != 16 }'
}
check "saliency whatever the batches" near "$tmp/a" "$tmp/b"
llm --model $carried --inspect --text "$tmp/other" --bootstrap 0 --out "$tmp/o" >/dev/null 2>&1
tail -c 4000 "$tmp/look/llm.experts.npy" >"$tmp/a" && tail -c 4000 "$tmp/o/llm.experts.npy" >"$tmp/b"
check "a text does not see the one before it" cmp "$tmp/a" "$tmp/b"
specific() { # of each expert's tokens: taken <= seen, share = taken / seen, at least 5 seen; ten at most
    tail -n +2 "$tmp/look/llm.tokens.csv" | sed 's/"\([^"]\|""\)*"/T/' | \
        awk -F , '{ n++; if ($6 > $7 || $7 < 5 || $3 > 10 ||
        $8 - $6 / $7 > 1e-6 || $6 / $7 - $8 > 1e-6 || $9 <= 0) bad++ } END { exit bad > 0 || n < 100 }'
}
check "tokens of the experts" specific
domains() {
    tail -n +2 "$tmp/look/llm.experts.csv" | awk -F , '{ of[$1 $5] += $7 }
        END { for (i in of) { n++; if (of[i] < 0.999999 || of[i] > 1.000001) bad++ } exit bad > 0 || n != 4 }'
}
check "a domain's shares are 1 together" domains
llm --model $carried --inspect --text "$text" --against $carried --bootstrap 20 --out "$tmp/o" --json \
    >"$tmp/against.out" 2>/dev/null
kept() { grep -c '"event":"compare".*"top1_overlap":1,.*"topk_overlap":1,' "$tmp/against.out"; }
check "against itself all is kept" same "$(kept)" 2
llm --series --text "$text" --steps-at 10,20,40 $carried $carried $carried --bootstrap 20 --out "$tmp/series" --json \
    >"$tmp/series.out" 2>/dev/null
check "a series" \
    grep -q '"event":"phases","step":\[10,20,40\],"gamma_eff":\[\([0-9.]*\),\1,\1\]' "$tmp/series.out"
check "its picture" grep -q 'with phases' "$tmp/series/llm.svg"
steps="--series --text $text --steps-at 2,1 --bootstrap 9 --out $tmp/o"
check "steps that do not ascend" refuses 2 'steps-at ascend' $steps $carried $carried
check "a series without a text" refuses 2 'series text' --series $carried
check "an empty text" refuses 2 'empty token' --model $carried --inspect --text "$tmp/empty" --out "$tmp/o"
check "inspect without a text" refuses 2 'inspect text' --model $carried --inspect
check "format all without a text" refuses 2 'format text' --model $carried --format all --prompt a

if [ -z "${MOE_MODELS:-}" ]; then
    echo "skipped the checkpoints: MOE_MODELS is not set"
    finish
fi

# ---- what the original code computed ----
check "npy_near" $cc -std=c99 -O0 -DMOE_NO_SIMD -I. tests/examples/npy_near.c -o "$tmp/near" -lm
tokens() { tr -d ' \n' <"$1" | sed -n "s/.*\"$2\":{\"tokens\":\[\([0-9,]*\)\].*/\1/p"; }
sequence() { # DIR EXPECTED NAME LOGITS
    ids=$(tokens "$2/expected.json" "$3")
    for batch in 128 1 3; do
        llm --model "$1" --ids "$ids" --dump "$tmp/d$batch" --batch $batch || return 1
    done
    llm --model "$1" --ids "$ids" --dump "$tmp/d2" --threads 2 --record "$tmp/record" || return 1
    llm --model "$1" --ids "$ids" --dump "$tmp/replay" --batch 2 --replay "$tmp/record" || return 1
    cmp "$tmp/d2.logits.npy" "$tmp/replay.logits.npy" || return 1
    for what in logits router_logits experts; do
        for other in 1 3 2; do cmp "$tmp/d128.$what.npy" "$tmp/d$other.$what.npy" || return 1; done
    done
    "$tmp/near" "$tmp/d128.logits.npy" "$2/$3.logits.npy" "$4" &&
        "$tmp/near" "$tmp/d128.router_logits.npy" "$2/$3.router_logits.npy" 5e-5 &&
        "$tmp/near" "$tmp/d128.experts.npy" "$2/$3.experts.npy" 0
}
greedy() { # DIR EXPECTED
    want=$(tr -d ' \n' <"$2/expected.json" | sed -n 's/.*"greedy":{"prompt":"b","tokens":\[\([0-9,]*\)\].*/\1/p')
    n=$(echo "$want" | tr , '\n' | wc -l)
    got=$(llm --model "$1" --ids "$(tokens "$2/expected.json" b)" --greedy "$n" --json | tail -n 1)
    same "$got" "{\"event\":\"final\",\"ids\":[$want]}"
}
count=0
for config in "$MOE_MODELS"/*/*/config.json; do
    dir=${config%/config.json} expected=${config%/config.json}/expected near=1e-4
    [ -d "$expected" ] || expected=${dir%_sharded}/expected
    case $dir in */granitemoe/*) near=1e-5 ;; esac
    for logits in "$expected"/*.logits.npy; do
        case $logits in *router*) continue ;; esac
        name=$(basename "$logits" .logits.npy)
        check "${dir#"$MOE_MODELS"/} $name" sequence "$dir" "$expected" "$name" $near
        count=$((count + 1))
    done
    check "${dir#"$MOE_MODELS"/} greedy" greedy "$dir" "$expected"
done
check "there were some" [ $count -gt 30 ]
olmoe=$MOE_MODELS/olmoe/f32
for b in 1 9 64; do llm --model "$olmoe" --text LICENSE --context 64 --stride 16 --batch $b >"$tmp/text$b"; done
check "perplexity by batch" cmp "$tmp/text1" "$tmp/text64"
check "perplexity by batch 9" cmp "$tmp/text9" "$tmp/text64"
check "drawing is repeated" same "$(llm --model "$olmoe" --prompt The --temperature 1 --seed 5 --tokens 9 2>&1)" \
    "$(llm --model "$olmoe" --prompt The --temperature 1 --seed 5 --tokens 9 2>&1)"

# ---- damaged checkpoints ----
broken() { # WORDS SED-COMMAND: config.json with a change
    rm -rf "$tmp/broken" && mkdir "$tmp/broken" && cp "$olmoe/model.safetensors" "$tmp/broken/"
    sed "$2" "$olmoe/config.json" >"$tmp/broken/config.json"
    refuses 2 "broken $1" --model "$tmp/broken" --ids 1,2 --greedy 1
}
check "no hidden_size" broken 'config.json hidden_size' '/hidden_size/d'
check "heads of 0" broken 'config.json num_attention_heads' 's/\("num_attention_heads": \)4/\10/'
check "heads that do not divide" broken 'config.json num_' 's/\("num_key_value_heads": \)4/\13/'
check "another width" broken 'shape' 's/\("hidden_size": \)64/\172/'
check "another vocabulary" broken 'embed_tokens.weight shape' 's/\("vocab_size": \)304/\1305/'
check "too many layers" broken 'model.layers' 's/\("num_hidden_layers": \)2/\13/'
check "eps as text" broken 'config.json rms_norm_eps' 's/\("rms_norm_eps": \)1e-05/\1"1e-05"/'
check "unknown scaling" broken 'config.json rope' 's/\("rope_scaling": \)null/\1{"type":"longer","factor":2}/'
check "another family" broken 'model_type gpt9' 's/\("model_type": \)"olmoe"/\1"gpt9"/'
cp "$olmoe/config.json" "$tmp/broken/" && head -c 100000 "$olmoe/model.safetensors" >"$tmp/broken/model.safetensors"
check "tensors cut off" refuses 2 'model.safetensors' --model "$tmp/broken" --ids 1,2 --greedy 1
rm "$tmp/broken/model.safetensors"
check "no tensors" refuses 2 'broken safetensors' --model "$tmp/broken" --ids 1,2 --greedy 1
check "a token past the vocabulary" refuses 2 'vocab_size 304' --model "$olmoe" --ids 1,304 --greedy 1
check "ids that are none" refuses 2 'ids' --model "$olmoe" --ids 1,x --greedy 1
finish
