#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What the tests need beyond Python: OpenSSH's server, as a program only, and where root runs them an account for
# the nodes, since a login shell that reads somebody's .bashrc costs time and makes results depend on it; and, as root,
# what some nodes have and others have not: sudo, tcsh, fish, zsh, busybox, and dropbear in OpenSSH's place.
# Not root: nothing is changed, and what is missing is said in one line. Does nothing that is done already.
set -eu
PATH=$PATH:/usr/sbin:/sbin
account=ctask-node

say() { echo "ctask: $*"; }
is_root() { [ "$(id -u)" = 0 ]; }
units() { ! command -v systemctl >/dev/null || systemctl --quiet "$1" ssh.service ssh.socket || true; }

# The tests start an sshd of their own on 127.0.0.0/8; this machine's service must not come up for it, neither now
# (mask, or a runlevel in which nothing is started) nor at the next boot (disable).
install_sshd() {
    say "installing Debian's openssh-server (the program; its service stays off)"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update
    units mask
    done=0
    RUNLEVEL=1 apt-get -q install -y --no-install-recommends openssh-server || done=$?
    units unmask
    units disable
    return "$done"
}

# Nothing is set up for them here: the tests' servers have a passwd and a sudoers of their own.
install_others() {
    say "installing $*, for the tests' nodes"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update
    apt-get -q install -y --no-install-recommends "$@"
}

make_account() {
    say "making the account $account for the tests' nodes (/bin/sh, an empty home, no password)"
    skeleton=$(mktemp -d)
    # '*' and not '!': an sshd without PAM takes '!' for a locked account and refuses its keys.
    useradd --system --create-home --home-dir "/home/$account" --skel "$skeleton" --shell /bin/sh \
        --password '*' --comment "nodes of ctask's tests" "$account"
    rmdir "$skeleton"
}

if ! command -v sshd >/dev/null; then
    if is_root && command -v apt-get >/dev/null; then
        install_sshd
    else
        say "the tests on a real sshd need OpenSSH's server: apt-get install openssh-server (as root)"
    fi
fi

missing=''
for program in sudo tcsh fish zsh busybox; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
# The program without the service that Debian's package "dropbear" would start.
command -v dropbear >/dev/null || missing="$missing dropbear-bin"
if [ "$missing" ] && is_root && command -v apt-get >/dev/null; then
    # shellcheck disable=SC2086 # each is a word
    install_others $missing || say "they could not be had: the tests that need them are skipped"
fi

if is_root && command -v sshd >/dev/null; then
    id "$account" >/dev/null 2>&1 || make_account
    # sshd's privilege separation asks for it; on Debian only the service makes it.
    [ -d /run/sshd ] || { say "making /run/sshd"; mkdir -m 0755 /run/sshd; }
fi
