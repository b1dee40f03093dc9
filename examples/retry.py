# SPDX-License-Identifier: Apache-2.0
"""Futures and retries: one node is busy at first, and says so by its exit status."""

from concurrent.futures import as_completed

from ctask import NodeSet, Retry, task_self

again = Retry(attempts=3, wait=0.3, exit_codes={75}, idempotent=True)
worker = task_self().submit("check-disk", nodes="demo[1-16]", timeout=20, retry=again)

tries: dict[tuple[int | None, ...], NodeSet] = {}
for future in as_completed(worker.futures.values()):
    result = future.result()
    tries.setdefault(tuple(attempt.rc for attempt in result.attempts), NodeSet()).add(result.node)
for statuses, nodes in sorted(tries.items(), key=lambda item: len(item[1])):
    print(f"{nodes}  {len(statuses)} {'try' if len(statuses) == 1 else 'tries'} {statuses}")
