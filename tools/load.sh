#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The tests marked `load` ten times, one after the other, beside two loops that do nothing but work: what depends on a
# thread having its turn in time fails here. After 60 s no more test is begun (what is left is skipped), and after 90 s
# all of it is killed.
# Usage: load.sh PYTHON [PYTEST-ARGUMENT...]
set -eu
python=$1
shift
cd "$(dirname "$0")/.."

loops=''
trap '[ -z "$loops" ] || kill $loops 2>/dev/null || true' EXIT
trap 'exit 1' HUP INT TERM
for _ in 1 2; do
    # Bounded by itself: an orphan of a script that was killed ends as well.
    timeout -s KILL 100 sh -c 'while :; do :; done' &
    loops="$loops $!"
done
echo "ctask: running the tests marked \`load\` beside two busy loops"
# Only the files that have such a test are read: all of them would take a quarter of the time.
# shellcheck disable=SC2046 # file names of ours
timeout --foreground -k 5 90 "$python" -m pytest -m load --rounds 10 --rounds-time 60 --timeout 25 -n 2 "$@" \
    $(grep -lE 'mark\.load\b' ctask_tests/test_*.py)
