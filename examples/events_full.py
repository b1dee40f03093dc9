# SPDX-License-Identifier: Apache-2.0
"""All events of a handler with their full signatures, in the order in which they are promised."""
# mypy: allow-untyped-defs
# ruff: noqa: UP031 - a handler has its event's signature; printed as ClusterShell's own page prints

from collections import defaultdict

from ctask import EventHandler, task_self


class MyHandler(EventHandler):
    def ev_start(self, worker):
        self.events = defaultdict(list)

    def ev_pickup(self, worker, node):
        self.events[node].append("pickup")

    def ev_read(self, worker, node, sname, msg):
        self.events[node].append("read")
        if msg.find(".el5") < 0:
            print("%s: %s" % (node, msg))

    def ev_hup(self, worker, node, rc):
        self.events[node].append(f"hup {rc}")

    def ev_done(self, worker, node, result):
        self.events[node].append(f"done {result.outcome.name}")

    def ev_close(self, worker, timedout):
        for node in worker.nodes:
            print(f"{node}: {', '.join(self.events[node])}")
        print("close, timed out:", timedout)


task = task_self()
task.shell("/bin/uname -r", nodes="green[36-39,133]", handler=MyHandler())
task.resume()
