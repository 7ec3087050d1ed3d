# What the tests of one example share; to be sourced from the repository's folder with its name in $example. Builds the
# program if it is not there; results go under $tmp.
program=${BUILD:-build}/$example
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
suite=$example
. tests/lib/check.sh
# run NAME EXPECTED_STATUS ARGUMENTS...: results in $tmp/NAME, output in $tmp/NAME.out, messages in $tmp/NAME.err
run() {
    name=$1 want=$2
    shift 2
    "$program" --quiet --out "$tmp/$name" "$@" >"$tmp/$name.out" 2>"$tmp/$name.err"
    status=$?
    check "$name: exit $status, not $want: $(tail -n 1 "$tmp/$name.err")" [ "$status" -eq "$want" ]
}
finals() { grep '^{"event":"final",' "$tmp/$1.out"; }
count() { finals "$1" | wc -l | tr -d ' '; }
says() { grep -q -e "$2" "$tmp/$1.err"; }
differ() { ! cmp -s "$1" "$2"; }
value_of() { sed -n "s/.*\"$1\":\"\{0,1\}\([^,}\"]*\).*/\1/p"; } # value_of KEY: in the lines read, a number or a word
holds() { awk "BEGIN { exit !($1) }" </dev/null; }

[ -x "$program" ] || make -s "$program" || exit 1
