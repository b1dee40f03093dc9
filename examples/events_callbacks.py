# SPDX-License-Identifier: Apache-2.0
"""Functions for single events, in place of a handler object; several may be given for one event."""
# mypy: allow-untyped-defs
# ruff: noqa: ARG001 - a handler has its event's signature, whatever it uses of it

from ctask import task_self


def show(worker, node, sname, msg):
    if msg.find(".el5") < 0:
        print(f"{node}: {msg}")


def count(worker, timedout):
    print(len(worker.ok), "of", len(worker.nodes), "nodes are fine")


task = task_self()
worker = task.shell("/bin/uname -r", nodes="green[36-39,133]", on_read=show)
worker.on("close", count)
task.resume()
