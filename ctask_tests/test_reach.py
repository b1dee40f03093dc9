# SPDX-License-Identifier: Apache-2.0
"""Servers that are slow to take connections, or wait for the client's first word (rows B16 and B17).

Runs in the thread of pytest, on a real sshd behind a door of its own.
"""

from __future__ import annotations

import pytest

from ctask import Outcome, Task
from ctask_tests.fix_sshd import Sshd
from ctask_tests.real_nodes import outcomes, run, task_of
from ctask_tests.slow_door import Door, door


def behind(sshd: Sshd, made: Door, addresses: list[str]) -> Task:
    """A task that reaches these addresses through the door."""
    task = task_of(sshd)
    known = sshd.known_hosts_for(*((address, made.port) for address in addresses))
    task.set_info("known_hosts", known)
    task.set_info("port", made.port)
    return task


def test_b17_a_server_that_waits_for_our_version_line_is_reached(sshd: Sshd) -> None:
    with door((sshd.address(1), sshd.port), first_word=True) as made:
        task = behind(sshd, made, ["127.0.0.1"])
        result = outcomes(run(task, "echo hi", "127.0.0.1", connect_timeout=5))["127.0.0.1"]
        task.disconnect()
    assert (result.outcome, str(result.stdout)) == (Outcome.EXITED, "hi\n")


@pytest.mark.slow
@pytest.mark.parametrize("one_address", [False, True], ids=["many addresses", "one address"])
def test_b16_nodes_behind_a_slow_server_with_a_small_queue_are_all_reached(sshd: Sshd, *, one_address: bool) -> None:
    count, takes = 40, 0.05
    addresses = [f"127.0.7.{number}" for number in range(1, count + 1)]
    if one_address:
        addresses = addresses[:1] * count
    with door((sshd.address(1), sshd.port), takes=takes, backlog=2) as made:
        task = behind(sshd, made, sorted(set(addresses)))
        nodes = [f"n{number}" for number in range(count)]
        for number, (node, address) in enumerate(zip(nodes, addresses, strict=True)):
            # Another beat is another target, and has connections of its own.
            task.node_options(node, address=address, alive_interval=30 + number)
        found = outcomes(run(task, "true", ",".join(nodes), connect_timeout=4))
        task.disconnect()
    assert {(result.outcome, result.why) for result in found.values()} == {(Outcome.EXITED, "")}
    assert made.accepted < 2 * count
