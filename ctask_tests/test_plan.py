# SPDX-License-Identifier: Apache-2.0
"""The plan is pure: facts in, actions out. Laws over random days, and the cases that the design names."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ctask.options import Target
from ctask.plan import PACE, Dial, Join, Making, Plan, Stage, Start


class Way:
    """What the plan needs of a transport."""

    def __init__(self, *, dials: bool) -> None:
        self.dials = dials


SSH, LOCAL = Way(dials=True), Way(dials=False)


class Job:
    """What the plan needs of a job."""

    def __init__(self, node: str, *, fresh: bool = False, way: Way = SSH) -> None:
        self.target = Target(address=node)
        self.fresh = fresh
        self.way = way

    def __repr__(self) -> str:
        return self.target.address


Kept = dict[str, int]


class Day:
    """A plan, and kept connections with places."""

    def __init__(self, fanout: int, room: int = 1_000_000) -> None:
        self.plan: Plan[Job, Making[Job], str] = Plan(fanout, lambda job: Making(job.target))
        self.kept: Kept = {}
        self.room = room
        self.now = 0.0

    def take(self, job: Job) -> str | None:
        node = job.target.address
        if self.kept.get(node, 8) < 8:
            self.kept[node] += 1
            return node
        return None

    def reserve(self, job: Job) -> bool:
        self.room -= self.room > 0
        return self.room > 0

    def step(self) -> list[object]:
        return list(self.plan.step(self.now, self.take, self.reserve))


def kinds(actions: list[object]) -> list[str]:
    return [type(action).__name__ for action in actions]


def test_a_silent_node_holds_no_slot() -> None:
    day = Day(fanout=2)
    silent = [Job(f"s{n}") for n in range(10)]
    well = Job("w")
    day.plan.submitted([*silent, well])
    dialed: list[object] = []
    for _ in range(10):
        dialed += [a for a in day.step() if isinstance(a, Dial)]
        day.now += PACE
    assert len(dialed) == 11, "all are dialed though two slots are all there is"
    assert day.plan.slots == 0
    making = next(a.making for a in dialed if isinstance(a, Dial) and well in a.making.jobs)
    day.plan.spoke(making)
    assert kinds(day.step()) == ["Shake"]
    assert day.plan.slots == 1


def test_dials_are_paced_by_what_was_not_heard_of_yet() -> None:
    day = Day(fanout=4)
    day.plan.submitted([Job(f"n{n}") for n in range(10)])
    assert kinds(day.step()).count("Dial") == 4
    assert day.step() == []
    assert day.plan.due() == PACE
    day.now = PACE
    assert kinds(day.step()).count("Dial") == 4


def test_jobs_for_one_target_share_one_making_and_keep_their_order() -> None:
    day = Day(fanout=64)
    jobs = [Job("n1") for _ in range(10)]
    day.plan.submitted(jobs)
    actions = day.step()
    assert kinds(actions) == ["Join", "Dial"] + ["Join"] * 9
    making = next(a.making for a in actions if isinstance(a, Dial))
    day.plan.spoke(making)
    assert kinds(day.step()) == ["Shake"]
    later = Job("n2")
    day.plan.submitted([later])
    day.kept["n1"] = 0
    day.plan.made(making)
    actions = day.step()
    started = [a.job for a in actions if isinstance(a, Start)]
    assert started == jobs[:8]
    joined = [a.job for a in actions if isinstance(a, Join)]
    assert joined == [*jobs[8:], later], "who finds no place begins the next, before those who came later"


def test_the_last_job_to_leave_cancels_the_making() -> None:
    day = Day(fanout=4)
    one, two = Job("n"), Job("n")
    day.plan.submitted([one, two])
    making = next(a.making for a in day.step() if isinstance(a, Dial))
    assert day.plan.withdrawn(one) is None
    orphan = day.plan.withdrawn(two)
    assert orphan is making
    assert orphan is not None
    assert orphan.stage is Stage.OVER


def test_a_slot_of_the_handshake_passes_to_who_stays() -> None:
    day = Day(fanout=1)
    one, two = Job("n"), Job("n")
    day.plan.submitted([one, two])
    making = next(a.making for a in day.step() if isinstance(a, Dial))
    day.plan.spoke(making)
    assert kinds(day.step()) == ["Shake"]
    day.plan.withdrawn(one)
    assert day.plan.slots == 1
    day.plan.withdrawn(two)
    assert day.plan.slots == 0


def test_a_hang_up_while_waiting_for_a_slot_is_no_try() -> None:
    day = Day(fanout=1)
    first, second = Job("a"), Job("b")
    day.plan.submitted([first, second])
    made = next(a.making for a in day.step() if isinstance(a, Dial))
    day.now = PACE
    waits = next(a.making for a in day.step() if isinstance(a, Dial))
    day.plan.spoke(made)
    day.plan.spoke(waits)
    assert kinds(day.step()) == ["Shake"]
    day.plan.hung_up(waits)
    assert day.step() == [], "no slot: it waits in the queue"
    day.plan.over(made)
    day.now += PACE
    assert kinds(day.step()) == ["Join", "Dial"]


def test_backoff_and_batches_hold_nothing_until_their_time() -> None:
    day = Day(fanout=1)
    job = Job("n")
    day.plan.backoff(job, 5.0)
    assert day.step() == []
    assert day.plan.due() == 5.0
    day.now = 5.0
    assert kinds(day.step()) == ["Join", "Dial"]
    held = [Job("x"), Job("y")]
    day = Day(fanout=4)
    day.plan.submitted(held, batch="second")
    assert day.step() == []
    day.plan.withdrawn(held[0])
    day.plan.opened("second")
    assert [a.job for a in day.step() if isinstance(a, Join)] == held[1:]


def test_without_descriptors_nothing_is_dialed_and_all_goes_on_later() -> None:
    day = Day(fanout=4, room=0)
    day.plan.submitted([Job("n")])
    assert day.step() == []
    assert day.plan.short
    day.room = 10
    assert kinds(day.step()) == ["Join", "Dial"]
    assert not day.plan.short


def test_a_fan_out_that_shrinks_lets_what_runs_go_on() -> None:
    day = Day(fanout=4)
    day.kept = {f"n{n}": 0 for n in range(8)}
    jobs = [Job(f"n{n}") for n in range(8)]
    day.plan.submitted(jobs)
    assert kinds(day.step()) == ["Start"] * 4
    day.plan.fanout = 1
    for job in jobs[:3]:
        day.plan.withdrawn(job)
    assert day.step() == []
    day.plan.withdrawn(jobs[3])
    assert kinds(day.step()) == ["Start"]


class AnyDay(RuleBasedStateMachine):
    """Whatever comes together: never more than fan-out, and in the end everybody had exactly one turn."""

    def __init__(self) -> None:
        super().__init__()
        self.fanout = 3
        self.day = Day(self.fanout)
        # Dicts as ordered sets: a run must be the same when it is repeated.
        self.live: dict[Job, None] = {}
        self.running: dict[Job, None] = {}
        self.makings: list[Making[Job]] = []
        self.finished: list[Job] = []
        self.names = itertools.cycle(("a", "b", "c", "local", "d", "e"))
        self.day.kept["local"] = 6  # of eight places

    @rule(count=st.integers(1, 4))
    def submit(self, count: int) -> None:
        names = [next(self.names) for _ in range(count)]
        jobs = [Job(name, way=LOCAL if name == "local" else SSH) for name in names]
        self.live.update(dict.fromkeys(jobs))
        self.day.plan.submitted(jobs)
        self.step()

    @rule(seconds=st.sampled_from((0.001, PACE, 1.0)))
    def pass_time(self, seconds: float) -> None:
        self.day.now += seconds
        self.step()

    def step(self) -> None:
        for action in self.day.step():
            if isinstance(action, Dial):
                assert all(job.way.dials for job in action.making.jobs)
                self.makings.append(action.making)
            elif isinstance(action, Start):
                assert action.job in self.live
                assert action.job not in self.running
                self.running[action.job] = None

    def pick(self, data: st.DataObject, stage: Stage) -> Making[Job] | None:
        these = [making for making in self.makings if making.stage is stage]
        return data.draw(st.sampled_from(these)) if these else None

    @rule(data=st.data())
    def server_speaks(self, data: st.DataObject) -> None:
        making = self.pick(data, Stage.DIALING)
        if making is not None:
            self.day.plan.spoke(making)
            self.step()

    @rule(data=st.data(), well=st.booleans())
    def handshake_ends(self, data: st.DataObject, well: bool) -> None:
        making = self.pick(data, Stage.SHAKING)
        if making is None:
            return
        if well:
            self.day.kept[making.target.address] = 0
            self.day.plan.made(making)
        else:
            jobs = list(making.jobs)
            self.day.plan.over(making)
            for job in jobs:
                self.end(job)
        self.step()

    @rule(data=st.data())
    def hangs_up(self, data: st.DataObject) -> None:
        making = self.pick(data, Stage.SPOKE)
        if making is not None:
            self.day.plan.hung_up(making)
            self.step()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def job_ends(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(list(self.live)))
        if job in self.running:
            self.day.kept[job.target.address] -= 1
        self.end(job)
        self.step()

    def end(self, job: Job) -> None:
        self.day.plan.withdrawn(job)
        self.running.pop(job, None)
        self.live.pop(job, None)
        self.finished.append(job)

    @invariant()
    def slots_are_counted_right(self) -> None:
        shaking = sum(making.stage is Stage.SHAKING for making in self.makings)
        assert self.day.plan.slots == len(self.running) + shaking <= self.fanout

    @invariant()
    def nobody_ends_twice(self) -> None:
        assert len(self.finished) == len(set(map(id, self.finished)))

    def teardown(self) -> None:
        """From wherever it is, the day can be brought to its end: nobody starves."""
        for _ in range(10_000):
            if not self.live:
                return
            self.day.now += PACE
            self.step()
            for making in list(self.makings):
                if making.stage is Stage.DIALING:
                    self.day.plan.spoke(making)
                elif making.stage is Stage.SHAKING:
                    self.day.kept[making.target.address] = 0
                    self.day.plan.made(making)
            for job in list(self.running):
                self.day.kept[job.target.address] -= 1
                self.end(job)
            self.makings = [making for making in self.makings if making.stage is not Stage.OVER]
        raise AssertionError(f"starved: {self.live}")


AnyDay.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyDay = AnyDay.TestCase


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_jobs_of_kept_nodes_start_in_their_order(nodes: list[int]) -> None:
    day = Day(fanout=100)
    day.kept = {f"n{n}": -100 for n in range(6)}
    jobs = [Job(f"n{n}") for n in nodes]
    day.plan.submitted(jobs)
    assert [a.job for a in day.step() if isinstance(a, Start)] == jobs


# -- ways -----------------------------------------------------------------------------------------------------------


def test_a_way_that_has_no_room_holds_up_no_other() -> None:
    day = Day(fanout=4, room=0)
    node, local, behind = Job("n"), Job("l", way=LOCAL), Job("m")
    day.kept = {"l": 0, "m": 0}
    day.plan.submitted([node, local, behind])
    assert [a.job for a in day.step() if isinstance(a, Start)] == [local], "what goes by one way keeps its order"
    day.kept["l"] = 8
    day.room = 10
    other = Job("l", way=LOCAL)
    day.plan.withdrawn(node)
    day.plan.submitted([other])
    day.plan.withdrawn(local)
    assert [a.job for a in day.step() if isinstance(a, Start)] == [behind]
    day.kept["l"] = 0
    assert [a.job for a in day.step() if isinstance(a, Start)] == [other]


def test_dials_that_are_paced_hold_up_no_other_way() -> None:
    day = Day(fanout=2)
    day.kept["l"] = 0
    day.plan.submitted([*(Job(f"n{n}") for n in range(3)), Job("l", way=LOCAL)])
    assert kinds(day.step()) == ["Join", "Dial", "Join", "Dial", "Start"]


def test_the_first_submitted_is_the_first_whichever_way_it_goes() -> None:
    day = Day(fanout=1)
    day.kept = {"n": -100, "l": -100}
    jobs = [Job("n" if n % 3 else "l", way=SSH if n % 3 else LOCAL) for n in range(12)]
    day.plan.submitted(jobs)
    started: list[Job] = []
    while len(started) < len(jobs):
        (action,) = day.step()
        assert isinstance(action, Start)
        started.append(action.job)
        day.plan.withdrawn(action.job)
    assert started == jobs


def test_where_nothing_is_dialed_a_fresh_connection_is_any() -> None:
    day = Day(fanout=1)
    day.kept["l"] = 0
    day.plan.submitted([Job("l", way=LOCAL, fresh=True)])
    assert kinds(day.step()) == ["Start"]


def test_where_nothing_is_dialed_a_job_without_a_place_waits_and_is_not_dialed() -> None:
    day = Day(fanout=1)
    day.plan.submitted([Job("l", way=LOCAL)])
    assert day.step() == []
    assert day.plan.short
    assert day.plan.dialing == 0
    day.kept["l"] = 0
    assert kinds(day.step()) == ["Start"]


# -- what is withdrawn is forgotten ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["queue", "behind", "backoff", "batch"])
def test_a_job_that_is_withdrawn_is_not_kept(where: str) -> None:
    day = Day(fanout=1, room=0)
    job = Job("n")
    ref = weakref.ref(job)
    if where == "backoff":
        day.plan.backoff(job, 1e9)
    elif where == "batch":
        day.plan.submitted([job], batch="later")
    else:
        day.plan.submitted([Job("m"), job] if where == "behind" else [job])
    day.step()
    day.plan.withdrawn(job)
    day.plan.due()
    gc.disable()
    try:
        del job
        assert ref() is None
    finally:
        gc.enable()
    assert day.plan.due() is None
    day.now = 2e9
    day.plan.opened("later")
    day.room = 10
    assert [a.job.target.address for a in day.step() if isinstance(a, Join)] == ["m"] * (where == "behind")


def test_backoffs_that_are_withdrawn_do_not_pile_up() -> None:
    day = Day(fanout=1)
    kept = Job("kept")
    for n in range(10_000):
        job = Job("n")
        day.plan.backoff(job, 1e6 + n)
        day.plan.withdrawn(job)
    day.plan.backoff(kept, 1e9)
    assert len(day.plan._backoffs) < 200
    assert day.plan.due() == 1e9
    day.now = 1e9
    assert kinds(day.step()) == ["Join", "Dial"]


def test_tries_that_are_due_together_keep_their_order() -> None:
    day = Day(fanout=100)
    day.kept["n"] = -100
    jobs = [Job("n") for _ in range(5)]
    for n, job in enumerate(jobs):
        day.plan.backoff(job, 1.0 + n)
    day.now = 10.0
    assert [a.job for a in day.step() if isinstance(a, Start)] == jobs
