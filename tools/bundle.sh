#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Packs ctask and all that it needs as wheels, with an install.sh, into one tar: for head nodes without a network.
# Usage: bundle.sh PYTHON FOLDER     The wheels are for this Python and this platform.
set -eu
python=$1 folder=$2
here=$(cd "$(dirname "$0")/.." && pwd)

say() { echo "ctask: $*"; }

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
trap 'exit 1' HUP INT TERM

say "building the wheels"
"$python" -m venv "$work/venv"
# pip itself goes along: the machine may have no ensurepip, and no network to get it from.
"$work/venv/bin/python" -m pip --disable-pip-version-check --quiet wheel --wheel-dir "$work/wheels" "$here" pip

version=$(cd "$work/wheels" && echo ctask-*.whl | cut -d- -f2)
python_version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
machine=$(uname -m)
name=ctask-$version-bundle

mkdir -p "$folder" "$work/$name"
mv "$work/wheels" "$work/$name/wheels"
cp "$here/LICENSE" "$work/$name/"
sed -e "s/@VERSION@/$version/g" -e "s/@PYTHON@/$python_version/g" -e "s/@MACHINE@/$machine/g" \
    "$here/tools/install.sh.in" >"$work/$name/install.sh"
chmod 755 "$work/$name/install.sh"
tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner -cf "$folder/$name.tar" "$name"
say "made $folder/$name.tar for Python $python_version on $machine: unpack it there, then ./install.sh FOLDER"
