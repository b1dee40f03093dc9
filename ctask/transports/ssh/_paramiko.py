# SPDX-License-Identifier: Apache-2.0
"""Refuses a paramiko that ctask cannot live on, and says which one it needs: imported before all else of this room.

Runs once, in the thread that is the first to ask for the `ssh` transport. Nothing here changes.
"""

from __future__ import annotations

import re

__all__ = ["LEAST", "NOT_YET"]

#: The first version that can be used, and the first that has not been seen yet; pyproject.toml says the same.
LEAST, NOT_YET = (5, 1), (6,)

_HELP = "pip install 'paramiko>=5.1,<6'"

try:
    import paramiko
except ImportError as error:
    raise ImportError(
        f"ctask reaches nodes by paramiko (5.1 or newer, below 6), which cannot be imported ({error}): {_HELP}",
        name="paramiko",
    ) from error

_found = tuple(int(number) for number in re.findall(r"\d+", paramiko.__version__)[:2])
if not LEAST <= _found < NOT_YET:
    raise ImportError(
        f"ctask needs paramiko 5.1 or newer, below 6, and this Python has {paramiko.__version__} "
        f"({paramiko.__path__[0]}): {_HELP}",
        name="paramiko",
    )
