# SPDX-License-Identifier: Apache-2.0
"""The second program of ClusterShell's own page: schedule two commands, run both, read both outputs."""

from ctask import task_self

task = task_self()
task.shell("/bin/uname -r", nodes="green[36-39,133]")
task.shell("/bin/uname -p", nodes="green[36-39,133]")
task.resume()
for buf, nodes in task.iter_buffers():
    print(nodes, buf)
