# SPDX-License-Identifier: Apache-2.0
"""What ctask uses of paramiko's inside: each private name, where it was when it was last read.

When paramiko moves one, these tests say which; then everything that names it in `ctask/transports/ssh` has to be
read again beside the new paramiko, and `PRIVATE` in `packets.py` brought up to date.

Runs in the thread of pytest, and connects to nothing.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import paramiko
import pytest
from paramiko import channel, packet, transport
from paramiko.common import (
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EXTENDED_DATA,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_WINDOW_ADJUST,
)

import ctask.transports.ssh
from ctask.transports.ssh.channel import _HANDLERS
from ctask.transports.ssh.packets import PRIVATE

CLASSES = {
    "Transport": paramiko.Transport,
    "Packetizer": packet.Packetizer,
    "Channel": paramiko.Channel,
}
FILES: dict[str, ModuleType] = {
    "transport.py": transport,
    "packet.py": packet,
    "channel.py": channel,
}
READ = "5.1.0"
#: of the source of its steps of a key exchange, when ours were written beside them
READ_KEYS = "36a9380bcb9b8ae1"
#: what we define under a private name of our own, which paramiko has by chance or asks for
OURS = {"_closed", "_flush", "_lock", "_wire", "_out", "_send"}


@pytest.fixture(scope="module")
def objects() -> Iterator[dict[str, object]]:
    here, there = socket.socketpair()
    with here, there:
        link = paramiko.Transport(here)
        yield {
            "Transport": link,
            "Packetizer": link.packetizer,
            "Channel": paramiko.Channel(0),
        }


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_private_attribute_is_where_it_was(name: str, objects: dict[str, object]) -> None:
    owner, attribute = name.split(".")
    advice = f"read what ctask/transports/ssh does with {attribute} again, beside paramiko {paramiko.__version__}"
    made_later = f"self.{attribute} = " in inspect.getsource(CLASSES[owner])
    assert made_later or hasattr(objects[owner], attribute), f"paramiko has no {name} any more: {advice}"
    if paramiko.__version__ == READ:
        file, line = PRIVATE[name].split(":")
        lines = inspect.getsource(FILES[file]).splitlines()
        word = attribute.removeprefix("_Packetizer")
        assert word in lines[int(line) - 1], f"{name} is not at {PRIVATE[name]} but elsewhere: {advice}"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Transport._send_message", ["self", "data"]),
        ("Transport._expect_packet", ["self", "ptypes"]),
        ("Transport._send_kex_init", ["self"]),
        ("Transport._parse_newkeys", ["self", "m"]),
        ("Transport._verify_key", ["self", "host_key", "sig"]),
        ("Transport._set_K_H", ["self", "k", "h"]),
        ("Transport._activate_outbound", ["self"]),
        ("Transport._log", ["self", "level", "msg", "args"]),
        ("Transport._next_channel", ["self"]),
    ],
)
def test_private_method_takes_what_it_took(name: str, parameters: list[str]) -> None:
    owner, attribute = name.split(".")
    assert list(inspect.signature(getattr(CLASSES[owner], attribute)).parameters) == parameters


def test_every_private_name_that_is_used_is_in_the_table() -> None:
    folder = Path(ctask.transports.ssh.__file__).parent
    known = {name.split(".")[1] for name in PRIVATE} | OURS
    of_paramiko = {
        name for owner in CLASSES.values() for name in vars(owner) if name.startswith("_") and name[1] != "_"
    } | {
        node.attr
        for module in FILES.values()
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    }
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", "") or ""
            if name in of_paramiko and name not in known:
                pytest.fail(f"{path.name}:{node.lineno}: {name} is paramiko's, and not in PRIVATE")  # type: ignore[attr-defined]


def test_the_packets_of_channels_are_those_that_ours_answer_to() -> None:
    apart = {MSG_CHANNEL_DATA, MSG_CHANNEL_EXTENDED_DATA}
    assert set(paramiko.Transport._channel_handler_table) == set(_HANDLERS) | apart
    numbers = range(MSG_CHANNEL_WINDOW_ADJUST, MSG_CHANNEL_FAILURE + 1)
    assert set(numbers) == set(_HANDLERS) | apart


def test_what_paramiko_does_with_keys_is_what_was_read() -> None:
    steps = ("_send_kex_init", "_set_K_H", "_compute_key", "_activate_outbound", "_activate_inbound", "_parse_newkeys")
    text = "".join(inspect.getsource(getattr(paramiko.Transport, name)) for name in steps)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == READ_KEYS, (
        "paramiko's key exchange has changed: read it beside Exchange, which has the rest of it"
    )
