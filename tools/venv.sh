#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes a virtual environment, or takes the one that is there, and installs ctask into it (editable).
# Usage: venv.sh PYTHON FOLDER EXTRA     (EXTRA: test, check, bench, or `run` for none)
set -eu
python=$1 folder=$2 extra=$3

say() { echo "ctask: $*"; }
die() { echo "ctask: $*" >&2; exit 1; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# Debian keeps `ensurepip` in a package of its own.
has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }

version=$(version_of "$python") ||
    die "no Python here by the name '$python': apt-get install python3 python3-venv, or PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "'$python' is Python $version and ctask needs 3.11 or newer: PYTHON=/path/to/python3.11"

if [ -e "$folder/pyvenv.cfg" ]; then
    found=$(version_of "$folder/bin/python") ||
        die "the Python of $folder is gone: 'make clean', then again"
    [ "$found" = "$version" ] ||
        die "$folder has Python $found and '$python' is $version: give VENV=another-folder, or 'make clean' first"
fi

# No pip: not made yet, or its making was broken off.
if ! "$folder/bin/python" -c 'import pip' 2>/dev/null; then
    if ! has_venv && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing Debian's python$version-venv"
        export DEBIAN_FRONTEND=noninteractive
        apt-get -q update
        apt-get -q install -y --no-install-recommends "python$version-venv"
    fi
    has_venv || die "'$python' cannot make virtual environments: apt-get install python$version-venv (as root)"
    say "making the virtual environment $folder with Python $version"
    "$python" -m venv "$folder"
fi

case $extra in
    run) what=. with= ;;
    *) what=".[$extra]" with=", with what \`$extra\` needs" ;;
esac
say "installing ctask into $folder$with"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$what"
