#!/bin/sh
# Download the full CIFAR-10 (binary version) and unpack it to DEST/cifar-10-batches-bin.
#   sh fetch.sh DEST [URL]
# The archive must have the SHA-256 of the official one (CIFAR_SHA256 overrides it, CIFAR_URL the address).
# Everything happens in a temporary folder inside DEST and appears there with one rename: after any failure nothing
# is left behind. A folder that is already there is kept as it is.
set -eu

sha=${CIFAR_SHA256:-c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd}
name=cifar-10-batches-bin

die() { echo "fetch.sh: $*" >&2; exit 1; }

sha256() {
    if command -v sha256sum > /dev/null; then sha256sum "$1"
    elif command -v shasum > /dev/null; then shasum -a 256 "$1"
    else openssl dgst -sha256 -r "$1"
    fi | cut -d' ' -f1
}

[ $# -ge 1 ] && [ -n "$1" ] || { echo "usage: sh fetch.sh DEST [URL]" >&2; exit 2; }
dest=$1
url=${2:-${CIFAR_URL:-https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz}}

if [ -e "$dest/$name" ]; then
    echo "$dest/$name is already there: kept"
    exit 0
fi
command -v curl > /dev/null || die "curl is needed to download $url"

made=
[ -d "$dest" ] || { mkdir -p "$dest" || die "cannot create $dest"; made=1; }
tmp=$(mktemp -d "$dest/.fetch.XXXXXX") || die "cannot write to $dest"
finish() {
    rm -rf "$tmp"
    [ -z "$made" ] || rmdir "$dest" 2> /dev/null || :
}
trap finish EXIT
trap 'exit 1' HUP INT TERM

echo "downloading $url"
quiet=--silent
[ ! -t 2 ] || quiet=--progress-bar
curl --fail --location --show-error $quiet --connect-timeout 30 --output "$tmp/archive.tar.gz" "$url" ||
    die "the download failed; nothing was changed"

got=$(sha256 "$tmp/archive.tar.gz")
[ "$got" = "$sha" ] ||
    die "wrong checksum: the archive's SHA-256 is $got, it should be $sha; nothing was changed"

gzip -dc "$tmp/archive.tar.gz" > "$tmp/archive.tar" && (cd "$tmp" && tar -xf archive.tar) ||
    die "the archive cannot be unpacked; nothing was changed"
for f in data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 test_batch; do
    [ -f "$tmp/$name/$f.bin" ] || die "the archive has no $name/$f.bin; nothing was changed"
done
mv "$tmp/$name" "$dest/$name" || die "cannot write $dest/$name"
made=
echo "$dest/$name is ready"
