# SPDX-License-Identifier: Apache-2.0
"""The third program of ClusterShell's own page: a handler with the older, short signature."""
# mypy: allow-untyped-defs, disable-error-code="override"
# ruff: noqa: UP031 - printed as that page prints it

from ctask import EventHandler, task_self


class MyHandler(EventHandler):
    def ev_read(self, worker):
        node, buf = worker.last_read()
        if buf.find(".el5") < 0:
            print("%s: %s" % (node, buf))


task = task_self()
task.shell("/bin/uname -r", nodes="green[36-39,133]", handler=MyHandler())
task.resume()
