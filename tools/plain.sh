#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The quick run as a plain account, by Debian's own Python: what most users have. The account's login shell is bash,
# and its sshd is its own. It works on a copy in a temporary folder, so that nothing of root's has to be readable, and
# all that it writes goes away with that folder. Root makes the account, where it is missing, and the environment.
# Usage: plain.sh [PYTEST-ARGUMENT...]     (PYTHON: /usr/bin/python3 where it is not given)
set -eu
python=${PYTHON-/usr/bin/python3}
account=ctask-plain
here=$(cd "$(dirname "$0")/.." && pwd)

say() { echo "ctask: $*"; }

[ "$(id -u)" = 0 ] || { say "only root becomes another account: \`make test\` is this run, as yours"; exit 2; }

if ! id "$account" >/dev/null 2>&1; then
    say "making the account $account (bash, no password)"
    # '*' and not '!': an sshd without PAM takes '!' for a locked account and refuses its keys.
    useradd --system --user-group --create-home --shell /bin/bash --password '*' \
        --comment "plain account of ctask's tests" "$account"
fi
home=$(getent passwd "$account" | cut -d: -f6)

# Not in $TMPDIR, which may be root's own.
folder=$(mktemp -d /tmp/ctask-plain-XXXXXX)
trap 'rm -rf -- "$folder"' EXIT
trap 'exit 1' HUP INT TERM
mkdir "$folder/copy" "$folder/tmp"
tar -C "$here" --exclude=./.git --exclude='./.venv*' --exclude=./build --exclude=./dist --exclude='./.*_cache' \
    --exclude=./.hypothesis --exclude=__pycache__ -cf - . | tar -C "$folder/copy" --no-same-owner -xf -
(cd "$folder/copy" && sh tools/venv.sh "$python" .venv test)
chown -R "$account:" "$folder"
# Whatever root's umask was.
chmod -R u+rwX "$folder"

say "running the quick run as $account, by $("$folder/copy/.venv/bin/python" --version)"
cd "$folder/copy"
[ $# -gt 0 ] || set -- -n 2 --dist worksteal
# Root's environment stays behind.
runuser -u "$account" -- env -i HOME="$home" USER="$account" LOGNAME="$account" SHELL=/bin/bash \
    PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 TMPDIR="$folder/tmp" ${CI+"CI=$CI"} \
    .venv/bin/python -m pytest -p no:cacheprovider -m 'not slow and not nightly' "$@"
