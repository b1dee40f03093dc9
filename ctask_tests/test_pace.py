# SPDX-License-Identifier: Apache-2.0
"""The pace of dials to one place: a simulated server with a queue, its kernel and ours; no socket, no clock."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable

import pytest

from ctask.transports.watcher.pace import FIRST, LEAST, Pace, place_of

#: When a kernel repeats itself, from its first try on.
REPEATS = (1.0, 3.0, 7.0, 15.0)


class World:
    """Time, and what happens when."""

    def __init__(self) -> None:
        self.now = 100.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self.pace = Pace(self.at, lambda: self.now)

    def at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._count), call))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            when, _, call = heapq.heappop(self._due)
            self.now = max(self.now, when)
            call()
        self.now = until


class Dial:
    """A dial to a server of the world; `charged` is the time that counts for its `connect_timeout`."""

    def __init__(self, world: World, server: Server, place: str = "n1", *, here: bool = False) -> None:
        self.world = world
        self.server = server
        self.tries = 0
        self.answered_at: float | None = None
        self.waits = False
        self.said: list[bool] = []
        self.charged = 0.0
        self._since = world.now
        if world.pace.ask(place, self, here=here):
            self.go()

    def go(self) -> None:
        self.tries += 1
        self.server.knock(self, self.tries)

    def dropped(self) -> bool:
        return self in self.server.out

    def take_back(self) -> None:
        self.server.out.discard(self)
        self.tries += 1  # what was begun before comes to nothing

    def stands(self, waits: bool) -> None:
        self._charge()
        self.waits = waits
        self.said.append(waits)

    def _charge(self) -> None:
        if not self.waits:
            self.charged += self.world.now - self._since
        self._since = self.world.now

    def answer(self) -> None:
        self._charge()
        self.answered_at = self.world.now
        self.world.pace.answered(self)


class Server:
    """Accepts one connection after the other, each for `takes` seconds; or all at once, answered after so long."""

    def __init__(
        self, world: World, takes: float, *, room: float = 5, parallel: bool = False, dead: bool = False
    ) -> None:
        self.world = world
        self.takes = takes
        self.room = room
        self.parallel = parallel
        self.dead = dead
        self.queue: deque[tuple[Dial, int]] = deque()
        self.out: set[Dial] = set()
        self.most = 0
        self.busy = False

    def knock(self, dial: Dial, tries: int, repeats: int = 0) -> None:
        if dial.tries != tries or self.dead:
            return
        if len(self.queue) >= self.room:
            self.out.add(dial)
            if repeats < len(REPEATS):
                again = REPEATS[repeats] - (REPEATS[repeats - 1] if repeats else 0.0)
                self.world.at(self.world.now + again, lambda: self.knock(dial, tries, repeats + 1))
            return
        self.out.discard(dial)
        self.world.pace.connected(dial)
        if self.parallel:
            self.world.at(self.world.now + self.takes, lambda: dial.answer() if dial.tries == tries else None)
            return
        self.queue.append((dial, tries))
        self._serve()

    def _serve(self) -> None:
        if self.busy or not self.queue:
            return
        dial, tries = self.queue.popleft()
        self.busy = True
        self.world.at(self.world.now + self.takes, self._ready)
        if dial.tries == tries:
            self.world.at(self.world.now + 0.005, dial.answer)

    def _ready(self) -> None:
        self.busy = False
        self._serve()


def on_their_way(dials: list[Dial]) -> int:
    return sum(1 for dial in dials if dial.tries and dial.answered_at is None)


@pytest.mark.parametrize("here", [False, True], ids=["one address", "this machine"])
@pytest.mark.parametrize(("count", "takes", "room"), [(60, 0.2, 5), (60, 0.2, 1), (500, 0.02, 5), (20, 1.0, 3)])
def test_b16_a_slow_server_with_a_small_queue_has_all_in_its_own_time(
    count: int, takes: float, room: int, *, here: bool
) -> None:
    world = World()
    server = Server(world, takes, room=room)
    dials = [Dial(world, server, here=here) for _ in range(count)]
    world.run(3.0 + 1.3 * count * takes)
    assert [dial for dial in dials if dial.answered_at is None] == []
    assert max(dial.charged for dial in dials) < 9.0  # a connect_timeout is 10 s


def test_b16_what_waits_behind_others_that_are_answered_is_told_so_and_told_when_it_goes() -> None:
    world = World()
    dials = [Dial(world, Server(world, 0.0), "other") for _ in range(1)]
    server = Server(world, 0.5, room=2)
    dials = [Dial(world, server) for _ in range(30)]
    assert not any(dial.said for dial in dials)  # nothing is known of the place yet
    world.run(2.0)
    waiting = [dial for dial in dials if dial.waits]
    assert len(waiting) > 15
    world.run(30.0)
    assert not any(dial.waits for dial in dials)
    assert all(dial.answered_at is not None for dial in dials)


def test_b16_a_place_that_falls_silent_takes_the_time_of_those_that_wait_for_it() -> None:
    world = World()
    server = Server(world, 0.5, room=2)
    dials = [Dial(world, server) for _ in range(30)]
    world.run(3.0)
    server.dead = server.busy = True
    server.queue.clear()
    world.run(20.0)
    assert not any(dial.waits for dial in dials)


@pytest.mark.parametrize("takes", [0.002, 0.05, 0.8])
def test_b16_a_server_that_answers_all_at_once_is_hardly_paced(takes: float) -> None:
    world = World()
    server = Server(world, takes, room=float("inf"), parallel=True)
    began = world.now
    dials = [Dial(world, server) for _ in range(500)]
    world.run(60.0)
    ends = [dial.answered_at for dial in dials if dial.answered_at is not None]
    assert len(ends) == 500
    assert max(ends) - began < 8 * takes + 0.1


def test_b16_places_have_nothing_to_do_with_each_other() -> None:
    world = World()
    dead = Server(world, 1.0, dead=True)
    others = [Dial(world, dead, f"dead{number % 3}") for number in range(300)]
    quick = Server(world, 0.001, room=float("inf"), parallel=True)
    dials = [Dial(world, quick, f"n{number}") for number in range(1000)]
    assert all(dial.tries == 1 for dial in dials)
    world.run(0.1)
    assert all(dial.answered_at is not None for dial in dials)
    assert on_their_way(others) == 3 * FIRST


def test_b16_dead_nodes_of_this_machine_hold_up_its_others_for_a_moment_only() -> None:
    world = World()
    dead = Server(world, 1.0, dead=True)
    for _ in range(500):
        Dial(world, dead, "here", here=True)
    quick = Server(world, 0.001, room=float("inf"), parallel=True)
    dial = Dial(world, quick, "here", here=True)
    world.run(1.0)
    assert dial.answered_at is not None


def test_b16_what_is_over_makes_room_and_is_forgotten() -> None:
    world = World()
    server = Server(world, 1.0, dead=True)
    dials = [Dial(world, server) for _ in range(FIRST + 1)]
    assert on_their_way(dials) == FIRST
    world.pace.left(dials[0])
    assert dials[-1].tries == 1
    for dial in dials:
        world.pace.left(dial)
        world.pace.left(dial)
    world.run(60.0)
    assert not world.pace._places
    assert not world.pace._of


def test_b16_dials_that_fail_at_once_do_not_pile_up_on_the_stack() -> None:
    world = World()

    class Failing(Dial):
        def go(self) -> None:
            self.tries += 1
            world.pace.left(self)

    server = Server(world, 1.0, dead=True)
    first = [Dial(world, server) for _ in range(FIRST)]
    dials = [Failing(world, server) for _ in range(5000)]
    world.pace.left(first[0])
    assert all(dial.tries == 1 for dial in dials)


def test_a_place_is_an_address_and_a_port_and_this_machine_is_one() -> None:
    assert place_of("10.0.0.1", 22) == (("10.0.0.1", 22), False)
    assert place_of("10.0.0.1", 22) != place_of("10.0.0.1", 2201)
    assert place_of("127.0.0.1", 22) == place_of("127.9.0.1", 22)
    assert place_of("127.0.0.1", 22)[1]
    assert LEAST > 1
