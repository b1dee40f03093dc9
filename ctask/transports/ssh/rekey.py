# SPDX-License-Identifier: Apache-2.0
"""The thread in which connections that are carried by the reader compute new keys, one after the other.

A step of a key exchange takes from half a millisecond to a tenth of a second, and a node decides when: in the reader
it would hold up every other connection. The thread is there while there is work; `_lock` guards both.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["compute"]

_lock = threading.Lock()
_steps: deque[Callable[[], None]] = deque()
_running = False


def compute(step: Callable[[], None]) -> None:
    """Carry out `step` soon, in the thread; at once where no thread can be had. Any thread; `step` does not raise."""
    global _running  # noqa: PLW0603
    with _lock:
        _steps.append(step)
        if _running:
            return
        _running = True
    try:
        threading.Thread(target=_work, name="ctask/rekey", daemon=True).start()
    except RuntimeError:  # no thread to be had
        _work()


def _work() -> None:
    global _running  # noqa: PLW0603
    while True:
        with _lock:
            if not _steps:
                _running = False
                return
            step = _steps.popleft()
        began = time.monotonic()
        step()
        del step  # what it holds is not to live until the next one
        # Half of the time is everybody else's, however many nodes ask for new keys.
        time.sleep(time.monotonic() - began if _steps else 0.0)


def _forked() -> None:
    global _lock, _running  # noqa: PLW0603
    _lock = threading.Lock()
    _steps.clear()
    _running = False


os.register_at_fork(after_in_child=_forked)
