# SPDX-License-Identifier: Apache-2.0
"""128 nodes with a fan-out of 64 and every outcome among them, ten times in one process that does not grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ctask import NodeSet
from ctask_tests.child import Child
from ctask_tests.fix_proxy import closed_port, silent
from ctask_tests.fix_sshd import Sshd, make_key, public_key, write_known_hosts

ROUNDS = 6
#: After these rounds all connections are closed, and the process is looked at.
LOOKS = (1, 2, 4, 6)
#: Outcome, error and phase, by the nodes that shall have them; all others are well.
SICK = {
    "n[91-98]": ("EXITED", "", "", 1),
    "n[99-104]": ("SIGNALED", "", "", 137),
    "n[105-108]": ("TIMEOUT", "CommandTimeout", "running", None),
    "n[109-112]": ("LOST", "ConnectionLost", "running", 255),
    "n[113-116]": ("ABORTED", "Aborted", "running", None),
    "n[117-119]": ("UNREACHED", "ConnectRefused", "tcp", 255),
    "n[120-122]": ("UNREACHED", "BannerError", "banner", 255),
    "n[123-125]": ("UNREACHED", "HostKeyMismatch", "hostkey", 255),
    "n[126-128]": ("UNREACHED", "AuthRejected", "auth", 255),
}

PROGRAM = r"""
import gc, json
from ctask.transports.ssh import wire
OPTIONS, ROUNDS, LOOKS = GIVEN["options"], GIVEN["rounds"], GIVEN["looks"]
ALL = NodeSet("n[1-128]")
for number, node in enumerate(ALL, 1):
    task.node_options(node, address=f"127.0.1.{number}", **OPTIONS)
task.node_options("n[105-108]", timeout=0.3)
task.node_options("n[117-119]", address=GIVEN["closed"][0], port=GIVEN["closed"][1])
task.node_options("n[120-122]", address=GIVEN["silent"][0], port=GIVEN["silent"][1], connect_timeout=0.5)
task.node_options("n[123-125]", known_hosts=GIVEN["wrong"])
task.node_options("n[126-128]", identity=GIVEN["stranger"])
task.set_info("fanout", 64)

COMMAND = '''set -- $SSH_CONNECTION; n=${3##*.}
if [ $n -le 90 ]; then echo fine
elif [ $n -le 98 ]; then exit 1
elif [ $n -le 104 ]; then kill -9 $$
elif [ $n -le 108 ]; then cat
elif [ $n -le 112 ]; then sleep 0.3; kill -9 $PPID; cat
else echo stop me; cat; fi'''

def read(worker, node, sname, msg):
    if msg == "stop me":
        worker.abort(node)

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))

def look():
    task.disconnect()
    wait_until(lambda: all(one._closed for one in list(wire._wires)))
    gc.collect()
    names = [thread.name for thread in threading.enumerate()]
    pool = [name for name in names if "/job" in name]
    return {
        "threads": sorted(set(names) - set(pool)),
        "pool": len(pool),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "peak": status("VmHWM"),
    }

most = 0
for number in range(1, ROUNDS + 1):
    ends = []
    worker = task.run(COMMAND, nodes=ALL, on_read=read, on_done=lambda worker, node, result: ends.append(node))
    assert sorted(ends) == sorted(ALL)
    assert worker.done()
    folded = {}
    for result in worker.results():
        error, phase = (type(result.error).__name__, result.phase) if result.error is not None else ("", "")
        folded.setdefault((result.outcome.name, error, phase, result.rc), []).append(result.node)
    told = {
        "outcomes": {str(NodeSet.fromlist(nodes)): key for key, nodes in folded.items()},
        "groups": sum(len(group.nodes) for group in worker.groups()),
        "fine": str(worker.ok),
        "buffers": {str(out): str(nodes) for out, nodes in task.iter_buffers()},
        "timeouts": task.num_timeout(),
    }
    del worker, result
    gc.collect()  # what is measured is what stays reachable, not when Python looks for the rest
    if number in LOOKS:
        told["look"] = look()
    say(json.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_128_nodes_six_times_with_every_outcome_and_no_growth(sshd: Sshd, tmp_path: Path) -> None:
    stranger = make_key(tmp_path / "stranger")
    other = public_key(make_key(tmp_path / "other_host"))
    addresses = [(sshd.address(number), sshd.port) for number in range(123, 126)]
    wrong = write_known_hosts(tmp_path / "wrong", addresses, [other])
    rounds: list[dict[str, Any]] = []
    with closed_port() as closed, silent() as no_word:
        given = {"options": dict(sshd.options()), "closed": closed, "silent": no_word, "wrong": wrong}
        with Child(PROGRAM, stranger=stranger, rounds=ROUNDS, looks=LOOKS, **given) as child:
            while line := child.line():
                rounds.append(json.loads(line))
            assert child.end() == 0, child.errors()
            assert child.errors() == ""
    assert len(rounds) == ROUNDS
    for told in rounds:
        check_outcomes(told)
    check_growth([told["look"] for told in rounds if "look" in told])
    sshd.wait_idle()


def check_outcomes(told: dict[str, Any]) -> None:
    expected = {"n[1-90]": ["EXITED", "", "", 0], **{nodes: list(end) for nodes, end in SICK.items()}}
    assert told["outcomes"] == expected
    assert told["groups"] == 128
    assert told["fine"] == "n[1-90]"
    assert told["buffers"] == {"fine": "n[1-90]", "stop me": "n[113-116]"}
    assert told["timeouts"] == len(NodeSet("n[105-108]"))


def check_growth(looks: list[dict[str, Any]]) -> None:
    first, second, *_, last = looks
    assert first["threads"] == second["threads"] == last["threads"]
    assert last["pool"] <= 3 * 64  # items of a slot at once: its job's, the one before it, and the ending of that
    assert last["descriptors"] <= first["descriptors"]
    # What the first rounds needed at most is enough for the others.
    assert last["peak"] - second["peak"] < 6_000, [look["peak"] for look in looks]
