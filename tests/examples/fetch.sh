#!/bin/sh
# Tests examples/data/fetch.sh with archives made here, over file:// addresses: needs no network.
set -u
here=$(cd "$(dirname "$0")/../.." && pwd)
fetch=$here/examples/data/fetch.sh
tmp=$(mktemp -d "${TMPDIR:-/tmp}/test-fetch.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
passed=0 failed=0

check() { # check WHAT COMMAND...
    what=$1
    shift
    if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "FAILED: $what" >&2; fi
}
run() { # run EXPECTED_STATUS WHAT ARGUMENTS...: runs fetch.sh, output in $tmp/log
    want=$1 what=$2
    shift 2
    sh "$fetch" "$@" > "$tmp/log" 2>&1
    status=$?
    check "$what: exit $status, not $want" [ "$status" -eq "$want" ]
}
says() { grep -q "$1" "$tmp/log"; }
empty() { [ ! -e "$1" ] || [ -z "$(ls -A "$1")" ]; }

if ! command -v curl > /dev/null; then
    echo "skipped: curl is not installed"
    echo "0 passed, 0 failed"
    exit 0
fi

mkdir -p "$tmp/src/cifar-10-batches-bin"
for f in data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 test_batch; do
    echo "contents of $f" > "$tmp/src/cifar-10-batches-bin/$f.bin"
done
(cd "$tmp/src" && tar -cf - cifar-10-batches-bin | gzip > "$tmp/good.tar.gz")
rm "$tmp/src/cifar-10-batches-bin/test_batch.bin"
(cd "$tmp/src" && tar -cf - cifar-10-batches-bin | gzip > "$tmp/lacking.tar.gz")
echo "this is not an archive" > "$tmp/noise.tar.gz"
sha() { sha256sum "$1" | cut -d' ' -f1; }

CIFAR_SHA256=$(sha "$tmp/good.tar.gz")
export CIFAR_SHA256
run 0 "good archive" "$tmp/a/b" "file://$tmp/good.tar.gz"
check "good archive: files" [ "$(cat "$tmp/a/b/cifar-10-batches-bin/test_batch.bin")" = "contents of test_batch" ]
check "good archive: nothing else is left" [ "$(ls -A "$tmp/a/b")" = cifar-10-batches-bin ]

echo mine > "$tmp/a/b/cifar-10-batches-bin/test_batch.bin"
run 0 "existing folder" "$tmp/a/b" "file://$tmp/good.tar.gz"
check "existing folder: kept" [ "$(cat "$tmp/a/b/cifar-10-batches-bin/test_batch.bin")" = mine ]
check "existing folder: says so" says kept

run 1 "missing file" "$tmp/c" "file://$tmp/none.tar.gz"
check "missing file: nothing left" [ ! -e "$tmp/c" ]
check "missing file: says so" says "download failed"

mkdir "$tmp/d"
run 1 "no host" "$tmp/d" "http://127.0.0.1:1/x.tar.gz"
check "no host: nothing left in a folder that was there" empty "$tmp/d"
check "no host: the folder itself stays" [ -d "$tmp/d" ]

CIFAR_SHA256=$(sha "$tmp/lacking.tar.gz")
run 1 "wrong checksum" "$tmp/e" "file://$tmp/good.tar.gz"
check "wrong checksum: nothing left" [ ! -e "$tmp/e" ]
check "wrong checksum: names both" says "$CIFAR_SHA256"
run 1 "archive without the test batch" "$tmp/e" "file://$tmp/lacking.tar.gz"
check "archive without the test batch: nothing left" [ ! -e "$tmp/e" ]
check "archive without the test batch: names it" says test_batch
CIFAR_SHA256=$(sha "$tmp/noise.tar.gz")
run 1 "not an archive" "$tmp/e" "file://$tmp/noise.tar.gz"
check "not an archive: nothing left" [ ! -e "$tmp/e" ]

unset CIFAR_SHA256
run 1 "default checksum" "$tmp/f" "file://$tmp/good.tar.gz"
check "default checksum: the official one" says c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd
check "default checksum: nothing left" [ ! -e "$tmp/f" ]

mkdir "$tmp/bin"
for tool in sh mkdir rmdir rm mktemp cut; do ln -s "$(command -v $tool)" "$tmp/bin/$tool"; done
(PATH=$tmp/bin && export PATH && sh "$fetch" "$tmp/g" "file://$tmp/good.tar.gz") > "$tmp/log" 2>&1
check "no curl: exit 1" [ $? -eq 1 ]
check "no curl: says so" says "curl is needed"
check "no curl: nothing left" [ ! -e "$tmp/g" ]

run 2 "no destination"
check "no destination: usage" says usage

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
