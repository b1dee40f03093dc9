# SPDX-License-Identifier: Apache-2.0
"""The standard library's Executor, of commands: one future per node, and map() over nodes."""

from ctask import ClusterExecutor, task_self

# Without a task it has one of its own, with options of its own: ClusterExecutor(user="root", timeout=30).
with ClusterExecutor(task_self()) as executor:
    for result in executor.map("uname -r", "green[36-39,133]"):
        print(f"{result.node}: {result.stdout.text}")
    print(executor.submit("uname -p", node="green133").result().stdout.text)
