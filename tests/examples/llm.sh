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
cat >"$own/tokenizer.json" <<'END'
{"added_tokens":[{"id":5,"content":"<s>","special":true}],"normalizer":null,
 "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false},"decoder":{"type":"ByteLevel"},"post_processor":null,
 "model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2,"\u0120":3,"\u0120ab":4},"merges":["a b","\u0120 ab"]}}
END
check "ids" same "$(llm --model "$own" --encode 'ab ab<s>b' --json)" '{"ids":[2,4,5,1]}'
check "ids as a list" same "$(llm --model "$own" --encode 'ab ab')" 2,4
check "text" same "$(llm --model "$own" --decode 2,4,5)" 'ab ab<s>'
check "no model" refuses 2 '--model' --prompt a
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
    llm --model "$1" --ids "$ids" --dump "$tmp/d2" --threads 2 || return 1
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
