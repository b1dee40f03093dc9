# SPDX-License-Identifier: Apache-2.0
"""The one thread per process that watches descriptors and the clock.

`loop` is the thread; `dial` and `resolver` lead from a name to a server that speaks.
"""

from ctask.transports.watcher.dial import Dial, Listener
from ctask.transports.watcher.loop import Timer, Watcher, close_watcher, settle, watcher

__all__ = ["Dial", "Listener", "Timer", "Watcher", "close_watcher", "settle", "watcher"]
