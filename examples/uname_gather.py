# SPDX-License-Identifier: Apache-2.0
"""The first program of ClusterShell's own page: run, then read what was gathered."""

from ctask import task_self

task = task_self()
task.run("/bin/uname -r", nodes="green[36-39,133]")
for buf, nodes in task.iter_buffers():
    print(nodes, buf)
