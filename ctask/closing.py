# SPDX-License-Identifier: Apache-2.0
"""The end of everything: what is done before the interpreter exits.

Registered once, when ctask is imported; runs in the main thread while the interpreter ends.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 (registered before us, so that it runs after us)
import logging
import threading
import time

from ctask import task, transports

__all__ = ["close_everything"]

log = logging.getLogger("ctask.closing")

#: Seconds that jobs have to get their outcome at the exit, and that threads have to end beyond it.
OUTCOMES_WITHIN = 1.0
THREADS_WITHIN = 0.2
#: Seconds after TERM at which local commands are killed at the exit: nobody is there to do it later. Nodes do it
#: themselves.
LOCAL_GRACE = 1.0


def close_everything(within: float = OUTCOMES_WITHIN) -> bool:
    """End all tasks of this process, what they run, and all kept connections; return whether their threads ended.

    The order: first the jobs, so that their nodes are told while the connections stand, by the policy of each; then
    what is left of local commands; then the connections, which ends what waits in them; then the threads. Tasks
    cannot be used afterwards; `task_self()` makes new ones.
    """
    tasks = task.all_tasks()
    until = time.monotonic() + within
    for one in tasks:
        one.close(within=0.9 * within)
    for one in tasks:
        one.closing(max(0.0, until - time.monotonic()))
    transports.end_local(LOCAL_GRACE)
    transports.close()
    # What was still at work in a connection is broken by its end.
    until = time.monotonic() + THREADS_WITHIN
    ended = [one.closing(max(0.0, until - time.monotonic())) for one in tasks]
    task.forget_tasks()
    return all(ended)


def _at_exit() -> None:
    """Close before the pool's threads are joined, and after users' own threads have done their work.

    `threading._register_atexit` calls run before non-daemon threads are joined: a task in a user's thread is
    waited for, as the interpreter would.
    """
    for one in task.all_tasks():
        thread = one.thread
        if not thread.daemon and thread is not threading.main_thread() and thread is not threading.current_thread():
            thread.join()
    close_everything()


# atexit is too late: since Python 3.9 the interpreter joins the pool's threads before it. A test on each Python
# says if this private function is gone.
threading._register_atexit(_at_exit)  # type: ignore[attr-defined]  # noqa: SLF001 (see above)
