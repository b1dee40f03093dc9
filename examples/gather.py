# SPDX-License-Identifier: Apache-2.0
"""One command on many nodes, then each distinct output once, with the nodes that said it."""

from ctask import NodeSet, task_self

task = task_self()
task.run("/bin/uname -r", nodes="demo[1-16]")
for buf, nodes in task.iter_buffers():
    print(NodeSet.fromlist(nodes), buf)
