#!/bin/sh
# What every example says of a command line that is wrong, from its own --help: an option with a letter missing, one
# without its value, a value that is no number or out of range, a file that is not there. Each ends with status 2 and
# one line that names the option, the value and what it may be, or the file and the system's reason.
# The last line is "N passed, N failed".
cd "$(dirname "$0")/../.." || exit 1
example=zoo
. tests/lib/example.sh
suite=messages
wrong() { # PATTERN ARGUMENTS...: status 2 and one line with the pattern on standard error
    pattern=$1
    shift
    "$program" --quiet --out "$tmp/out" "$@" >"$tmp/out.txt" 2>"$tmp/err.txt" </dev/null
    status=$?
    if [ $status -eq 2 ] && [ "$(wc -l <"$tmp/err.txt")" -eq 1 ] && grep -q -e "$pattern" "$tmp/err.txt"; then
        return 0
    fi
    echo "$program $*: status $status, not '$pattern': $(cat "$tmp/err.txt")"
    return 1
}
option() { # NAME HINT, as --help has them
    check "$name --${1%?}: near names" wrong "^$name: --${1%?}x: no such option; did you mean .*$1" "--${1%?}x"
    case $2 in
        N | X)
            kind=number
            [ "$2" = N ] && kind='whole number'
            values=-9999999 # what is no number at all: in one program, all read it alike (examples/common/args.h)
            [ "$name" = zoo ] && values="'' 1x -9999999 1e999"
            for value in $values; do
                [ "$value" = "''" ] && value=
                check "$name --$1 '$value'" wrong "^$name: --$1 $value: must be a $kind " "--$1=$value"
            done
            ;;
        DIR | FILE | FILE,* | NAME | NAMES | TEXT | PREFIX | *,..*) ;;
        '') check "$name --$1=1" wrong "^$name: --$1: takes no value" "--$1=1" ;;
        *) check "$name --$1: a hint of a kind that is known, not $2" [ "$2" = C ] ;;
    esac
    [ -z "$2" ] || check "$name --$1 without its value" wrong "^$name: --$1: a value is missing" "--$1"
}
options=0
for source in $(grep -l 'args_parse' examples/*.c); do
    name=$(basename "$source" .c)
    program=${BUILD:-build}/$name
    [ "$name" = expert_parallel ] && [ ! -x "$program" ] && continue # where there is no MPI
    check "$name is there" [ -x "$program" ] || make -s "$program"
    "$program" --help | sed -n 's/^  --\([a-z0-9-]*\) \([A-Z][A-Z,.]*\) .*/\1 \2/p; t; s/^  --\([a-z0-9-]*\) .*/\1/p' \
        >"$tmp/all"
    most=99
    [ "$name" = expert_parallel ] && most=1 # MPI begins first, slowly
    head -n $most "$tmp/all" >"$tmp/options"
    while read -r opt hint; do
        [ "$opt" = help ] && continue
        option "$opt" "$hint"
        options=$((options + 1))
    done <"$tmp/options"
    check "$name -x" wrong "^$name: -x: no such option" -x
    has() { grep -q -e "^$1\( \|\$\)" "$tmp/all"; }
    if has data; then
        check "$name: no such folder" wrong '^error: /no/where.*: .*No such file or directory' --data /no/where
    fi
    if has isa; then
        check "$name: no such instruction set" wrong "--isa: there is no 'avx'; did you mean avx2, avx512?" --isa avx
    fi
    if has system; then
        check "$name: no such system" wrong "^$name: --system: there is no 'olmo'; did you mean olmoe?" --system olmo
        check "$name: nothing like it" wrong "there is no 'frobnicator'; there are: dense, .*, olmoe, " \
            --system frobnicator
    fi
    if has set; then
        check "$name --set: a field" wrong "^$name: --set: topk: no such field; did you mean top_k, top_p?" --set topk=1
        check "$name --set: a value" wrong "^$name: --set: gate = soft: must be one of .*did you mean" --set gate=soft
        check "$name --set: a range" wrong "capacity_factor = -2: must be a number, at least 0, or off" \
            --set capacity_factor=-2
        check "$name --set: what must fit" wrong 'top_k = 99: must be 1 to n_experts (n_experts = ' --set top_k=99
    fi
done
check "some options" [ $options -ge 150 ]

# ---- files ----
program=${BUILD:-build}/llm
check "a model that is not there" wrong '^error: /no/where/.*.json: .*No such file' --model /no/where --prompt x
check "a text that is not there" wrong '^error: /no/text: .*No such file' --text /no/text
check "a routing that is not there" wrong '^error: /no/routing: .*No such file' --prompt x --replay /no/routing
program=${BUILD:-build}/inspect
check "logits that are not there" wrong '^inspect: /no/x.npy: .*No such file' --top-k 2 /no/x.npy
check "a router that is not there" wrong '^inspect: /no/r: .*No such file' --top-k 2 --router /no/r \
    examples/data/router.npy
program=${BUILD:-build}/repetition
check "a text that is not there" wrong '^error: /no/text: .*No such file' --text /no/text
program=${BUILD:-build}/wikitext2
check "nothing to go on from" wrong '^error: .*training.state: .*No such file' --resume --steps 1
lists() { [ "$("${BUILD:-build}/zoo" --list | grep -c -e '^olmoe  *= softmax-topk' -e '^switch  ')" -eq 2 ]; }
check "zoo --list: systems and aliases" lists
finish
