# SPDX-License-Identifier: Apache-2.0
"""What `make demo` and `make shell` run: an embedded cluster, the examples on it, and the end of both.

Everything runs in the main thread, on its own task; the cluster lives in processes of its own.
"""

from __future__ import annotations

import argparse
import ast
import code
import contextlib
import io
import os
import platform
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ctask import NodeSet, Task, __version__, task_self
from ctask.testing import EmbeddedCluster

HERE = Path(__file__).resolve().parent
DEMO, GREEN = NodeSet("demo[1-16]"), NodeSet("green[36-39,133]")
WIDTH = 98


class NotAsItShouldError(Exception):
    """Raised when an example did something else than it should."""


@dataclass(frozen=True)
class Run:
    """What an example did."""

    output: str
    seconds: float
    names: dict[str, Any]
    connections: int  # those that were made

    def expect(self, *lines: str, in_order: bool = True) -> None:
        """Compare what was printed."""
        printed = self.output.splitlines()
        if (printed if in_order else sorted(printed)) != (list(lines) if in_order else sorted(lines)):
            raise NotAsItShouldError(f"expected {'; '.join(lines)}")


@dataclass(frozen=True)
class Example:
    """A program, what its nodes must be like, and what it should do: `check` tells the facts."""

    title: str
    file: str
    check: Callable[[Run], str]
    prepare: Callable[[EmbeddedCluster], None] = lambda cluster: None


class Indented(io.TextIOBase):
    """Passes on what is printed, line by line and indented, while it is printed; and keeps it."""

    def __init__(self) -> None:
        self._rest = ""
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            say(f"   {line}")
        return len(text)


# -- the examples --


def check_gather(run: Run) -> str:
    run.expect(f"{DEMO} {platform.release()}")
    return f"{len(DEMO)} nodes, 1 output, cold {run.seconds:.2f} s"


def check_two(run: Run) -> str:
    run.expect(f"{DEMO} {platform.release()}", f"{DEMO} {platform.machine()}")
    if run.connections:
        raise NotAsItShouldError(f"{run.connections} connections were made again")
    return f"connections were kept: {2 * len(DEMO)} commands in {run.seconds:.2f} s"


def fill_scratch(cluster: EmbeddedCluster) -> None:
    cluster.command(DEMO, "df", "echo 'Use%'; echo ' 41%'")
    cluster.command("demo7", "df", "echo 'Use%'; echo ' 97%'")


def check_watch(run: Run) -> str:
    run.expect("demo7: /scratch is 97 % full")
    return "the other 15 said 41 %, which nobody had to read (these nodes have a df of their own)"


def make_busy(cluster: EmbeddedCluster) -> None:
    cluster.command(DEMO, "check-disk", "echo ok")
    seen = '"${0%/*}/../seen"'
    cluster.command("demo4", "check-disk", f"echo x >>{seen}; [ $(grep -c x {seen}) -ge 3 ] || exit 75; echo ok")


def check_retry(run: Run) -> str:
    run.expect("demo4  3 tries (75, 75, 0)", "demo[1-3,5-16]  1 try (0,)")
    return f"a status asked for another try, twice; nobody else waited for it ({run.seconds:.2f} s in all)"


def check_uname_gather(run: Run) -> str:
    run.expect(f"{GREEN} {platform.release()}")
    return f"five nodes, one line, cold {run.seconds:.2f} s"


def check_uname_two(run: Run) -> str:
    processor = subprocess.run(["uname", "-p"], capture_output=True, check=True, text=True).stdout.strip()
    run.expect(f"{GREEN} {platform.release()}", f"{GREEN} {processor}")
    return "two workers, two lines, each with all five nodes"


def check_events_short(run: Run) -> str:
    run.expect(*(f"{node}: {platform.release()}" for node in GREEN), in_order=False)
    return "text, not b'…', by the signature that older programs have"


def check_events_full(run: Run) -> str:
    lines = run.output.splitlines()
    story = [f"{node}: pickup, read, hup 0, done EXITED" for node in GREEN]
    if lines[len(GREEN) :] != [*story, "close, timed out: False"]:
        raise NotAsItShouldError("the events are not in their order")
    return "pickup, what was read, the status and the outcome, node by node; start first and close last"


def check_events_callbacks(run: Run) -> str:
    said = [f"{node}: {platform.release()}" for node in GREEN]
    if sorted(run.output.splitlines()[:-1]) != sorted(said) or "5 of 5" not in run.output:
        raise NotAsItShouldError("not all five nodes were heard")
    return "the same without a class"


def spoil_the_day(cluster: EmbeddedCluster) -> None:
    cluster.command(DEMO, "check-node", "echo ok")
    cluster.command("demo16", "check-node", "sleep 600")
    cluster.refuse("demo13")
    cluster.silence("demo14")
    cluster.change_key("demo15")


def check_badday(run: Run) -> str:
    worker = run.names["worker"]
    seen = {"ok": worker.ok, "unreached": worker.unreached, "timedout": worker.timedout}
    due = {"ok": "demo[1-12]", "unreached": "demo[13-15]", "timedout": "demo16"}
    if {name: str(nodes) for name, nodes in seen.items()} != due:
        raise NotAsItShouldError(f"expected {due}, got {seen}")
    return f"every node once: nobody waited longer than the timeouts ({run.seconds:.1f} s in all)"


def check_guard(run: Run) -> str:
    run.expect("NodeSetError: no such group: @pord. Did you mean @prod? Nothing was run.")
    if run.connections:
        raise NotAsItShouldError(f"{run.connections} connections were made")
    return "no node was even connected to; ClusterShell would have rebooted all 16"


EXAMPLES = (
    Example("gather", "gather.py", check_gather),
    Example("two commands at once", "two.py", check_two),
    Example("events: say only what is wrong, while it runs", "watch.py", check_watch, fill_scratch),
    Example("futures and retries: one node is busy at first", "retry.py", check_retry, make_busy),
    Example("ClusterShell's own page: run and gather", "uname_gather.py", check_uname_gather),
    Example("ClusterShell's own page: two commands", "uname_two.py", check_uname_two),
    Example("ClusterShell's own page: a handler", "events_short.py", check_events_short),
    Example("the same with all events, in their order", "events_full.py", check_events_full),
    Example("the same with functions", "events_callbacks.py", check_events_callbacks),
    Example(
        "a bad day: one node refuses, one is silent, one has another host key, one hangs",
        "badday.py",
        check_badday,
        spoil_the_day,
    ),
    Example("an editor's mistake, refused", "guard.py", check_guard),
)

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")


# -- the driver --


def main() -> int:
    arguments = parse()
    others = ", ".join(f"{name} {version(name)}" for name in ("paramiko", "tenacity"))
    python = f"{Path(sys.prefix).name}: Python {platform.python_version()}"
    step(f"[1/3] {python}, ctask {__version__}, {others}", arguments.setup_seconds)
    cluster = EmbeddedCluster(DEMO | GREEN)
    try:
        began = time.monotonic()
        task = task_self()
        cluster.use(task)
        seconds = time.monotonic() - began
        place = f"{addresses(cluster)}:{cluster.port}"
        count = len(cluster.nodes)
        step(f"[2/3] cluster {cluster.nodes}: {count} SSH servers in one process, {place}", seconds)
        keys = f"{count} host keys made now, verified on every connection"
        say(f"      {keys}; ~/.ssh is neither read nor written")
        if arguments.shell:
            interact(cluster, task)
            good = True
        else:
            good = run_all(cluster)
    finally:
        cluster.close()
    processes, files = cluster.left_behind()
    clean = not processes and not files
    gone = "The cluster is gone, nothing" if clean else "The cluster is closed, but something"
    say(f"{gone} is left behind ({len(processes)} processes, {len(files)} files).")
    if good and not arguments.shell:
        say("Next:  make shell   keeps the cluster up and opens a prompt with ctask in it")
    return 0 if good and clean else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the examples on an embedded cluster.")
    parser.add_argument("--shell", action="store_true", help="keep the cluster, and open a prompt")
    parser.add_argument("--setup-seconds", type=float, help="how long the set-up took, to be told")
    return parser.parse_args()


def run_all(cluster: EmbeddedCluster) -> bool:
    count = NUMBERS[len(EXAMPLES)]
    say(f"[3/3] {count} programs, as they stand in examples/\n")
    failed = [number for number, example in enumerate(EXAMPLES, 1) if not run_one(number, example, cluster)]
    if failed:
        say(f"\nNot as they should: {', '.join(map(str, failed))} of {len(EXAMPLES)}.")
        return False
    say(f"\nAll {count} did what they should.", end=" ")
    return True


def run_one(number: int, example: Example, cluster: EmbeddedCluster) -> bool:
    say(f"{f'{number}  {example.title}':<{WIDTH - 22}}  examples/{example.file}")
    for line in source(HERE / example.file):
        say(f"   | {line}".rstrip())
    example.prepare(cluster)
    before = len(cluster.left_behind()[0])
    output = Indented()
    began = time.monotonic()
    try:
        with contextlib.redirect_stdout(output):
            names = runpy.run_path(str(HERE / example.file), run_name="__main__")
    except Exception:  # noqa: BLE001 - whatever it is, it is this example's, and the others are still to be seen
        traceback.print_exc()
        say("   NOT AS IT SHOULD: it raised")
        return False
    seconds = time.monotonic() - began
    made = max(0, len(cluster.left_behind()[0]) - before)  # each connection has a process on its node
    try:
        say(f"   {example.check(Run(output.text, seconds, names, made))}")
    except NotAsItShouldError as error:
        say(f"   NOT AS IT SHOULD: {error}")
        return False
    return True


def interact(cluster: EmbeddedCluster, task: Task) -> None:
    names = {"task": task, "task_self": task_self, "NodeSet": NodeSet, "cluster": cluster}
    with contextlib.suppress(ImportError):  # a Python without them has a plainer prompt
        import readline
        import rlcompleter

        readline.set_completer(rlcompleter.Completer(names).complete)
        readline.parse_and_bind("tab: complete")
    say("[3/3] a prompt with task, task_self, NodeSet and cluster in it; Ctrl-D ends both\n")
    say('      >>> worker = task.run("uname -r; uptime", nodes="demo[1-16]")')
    say("      >>> for group in worker.groups(): print(group)")
    say('      >>> cluster.refuse("demo3")          # or silence, change_key, drop, restore\n')
    code.interact(banner="", local=names, exitmsg="")


def source(path: Path) -> Iterator[str]:
    """Yield the lines of a program from its first own statement on, without what only our tools read."""
    text = path.read_text(encoding="utf-8")
    for statement in ast.parse(text).body[1:]:  # behind the docstring
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            own = "\n".join(text.splitlines()[statement.lineno - 1 :])
            yield from own.replace("\n\n\n", "\n\n").splitlines()
            return


def addresses(cluster: EmbeddedCluster) -> str:
    return str(NodeSet.fromlist([cluster.address(node) for node in cluster.nodes]))


def step(text: str, seconds: float | None) -> None:
    took = "" if seconds is None else f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    say(f"{text:<{WIDTH}} {took:>6}".rstrip())


def say(text: str, end: str = "\n") -> None:
    # To the real standard output, also while that of an example is taken.
    print(text, end=end, file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    os.environ.pop("SSH_AUTH_SOCK", None)  # the cluster has a key of its own
    sys.exit(main())
