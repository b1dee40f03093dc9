# SPDX-License-Identifier: Apache-2.0
"""A real dropbear on loopback, in place of OpenSSH's sshd: its commands lead no session, and share one group.

Runs in the thread of the test that uses it. Only root has one: it needs a passwd and a list of shells of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from ctask_tests.ending_nodes import needs_mounts
from ctask_tests.fix_sshd import ACCOUNT, Sshd

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Dropbear", "needs_dropbear"]

#: Both accounts log in with the server's keys, and have a shell that marks what it runs: dropbear clears the
#: environment. The folder /etc is one of its own: a mount over a file of this machine's goes when the file is replaced.
ACCOUNTS = f"""
mkdir -p "$FOLDER/home/.ssh" "$FOLDER/etc"
ln -s "$FOLDER/authorized_keys" "$FOLDER/home/.ssh/authorized_keys"
printf '#!/bin/sh\\nexport %s\\n%s\\n' "$MARK" "$LOGIN" >"$FOLDER/login"
chmod 755 "$FOLDER/login"
for path in /etc/*; do
    case $path in */*shadow* | */passwd* | */shells | */ssh | */ssl) continue ;; esac
    cp -a "$path" "$FOLDER/etc"
done
echo "$FOLDER/login" >"$FOLDER/etc/shells"
{{
    grep -v -E "^(root|{ACCOUNT}):" /etc/passwd
    echo "root:x:0:0::$FOLDER/home:$FOLDER/login"
    echo "{ACCOUNT}:x:$(id -u {ACCOUNT}):$(id -g {ACCOUNT})::$FOLDER/home:$FOLDER/login"
}} >"$FOLDER/etc/passwd"
printf '%s:*:19000:0:99999:7:::\\n' root {ACCOUNT} >"$FOLDER/etc/shadow"
mount --bind "$FOLDER/etc" /etc
"""


class Dropbear(Sshd):
    """One dropbear, with the keys and the folder of an `Sshd`.

    `login` is what the accounts' login shell does at last, with the command as its arguments; `mounts` as with `Sshd`.
    """

    def __init__(self, *, login: str = 'exec /bin/sh "$@"', mounts: str = "") -> None:
        super().__init__()
        self._login = login
        self._more = mounts

    def _launch(self, program: str, host_keys: Iterable[str]) -> None:
        del program
        found = shutil.which("dropbear", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
        assert found is not None
        folder = str(self.folder)
        words = [found, "-F", "-E", "-m", "-p", f"{self.address(1)}:{self.port}", "-P", f"{folder}/pid"]
        for path in host_keys:
            convert = ["dropbearconvert", "openssh", "dropbear", path, f"{path}.dropbear"]
            subprocess.run(convert, check=True, capture_output=True)
            words += ["-r", f"{path}.dropbear"]
        lines = ["set -e", "FOLDER=$1 MARK=$2 LOGIN=$3", "shift 3", ACCOUNTS, self._more, 'exec "$@"']
        command = ["unshare", "--mount", "--", "sh", "-c", "\n".join(lines), "sh", folder, self._mark, self._login]
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )


def needs_dropbear() -> None:
    """Skip the test where there can be no dropbear."""
    needs_mounts("dropbear", "dropbearconvert", "setpriv")
