# SPDX-License-Identifier: Apache-2.0
"""Events: say only what is wrong, as soon as a node says it."""
# mypy: allow-untyped-defs


from ctask import EventHandler, task_self


class Watch(EventHandler):
    def ev_read(self, worker, node, sname, msg):
        full = str(msg).strip(" %")
        if not full.isdigit():
            print(f"{node}: {msg}")
        elif int(full) >= 90:
            print(f"{node}: /scratch is {full} % full")


task = task_self()
task.run("df --output=pcent /scratch | tail -n 1", nodes="demo[1-16]", handler=Watch())
