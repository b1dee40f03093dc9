# SPDX-License-Identifier: Apache-2.0
"""Nodes that cannot be reached, and one that hangs: nobody waits for them, and nobody is forgotten."""

from ctask import task_self
from ctask.display import account

task = task_self()
worker = task.run("check-node", nodes="demo[1-16]", timeout=2, connect_timeout=1)
for buf, nodes in task.iter_buffers():
    print("-" * 15, f"{nodes} ({len(nodes)})", "-" * 15, buf, sep="\n")
print(account(worker))
