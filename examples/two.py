# SPDX-License-Identifier: Apache-2.0
"""Two commands on the same nodes at once: `shell()` schedules, `resume()` runs what is scheduled."""

from ctask import NodeSet, task_self

task = task_self()
task.shell("/bin/uname -r", nodes="demo[1-16]")
task.shell("/bin/uname -m", nodes="demo[1-16]")
task.resume()
for buf, nodes in task.iter_buffers():
    print(NodeSet.fromlist(nodes), buf)
