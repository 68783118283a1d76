"""Tests the control channel: no message is lost, all processes stop together, deaths are noticed, one exit status."""

import gc
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from typing import Any

import pytest

import voxquilt.distributed.tcp_channel
from voxquilt.distributed.control_channel import BROKEN, ControlChannel, LocalChannel, Message, Stop
from voxquilt.distributed.tcp_channel import Hub, Spoke
from voxquilt.errors import RunError

SIGTERM = Stop("SIGTERM", 143)


class Exits:
    """Stands in for os._exit, which would end the tests."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.asked = threading.Event()

    def __call__(self, status: int) -> None:
        self.statuses.append(status)
        self.asked.set()


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> Exits:
    """No grace period and no real exit: a spoke that loses its hub asks to exit at once."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(voxquilt.distributed.tcp_channel, "_GRACE", 0.2)
    found = Exits()
    monkeypatch.setattr(os, "_exit", found)
    return found


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Run actions in one thread each, all started at once; returns their results."""
    found: list[Any] = [None] * len(actions)
    threads = [
        threading.Thread(target=lambda n=n, action=action: found.__setitem__(n, action()), daemon=True)
        for n, action in enumerate(actions)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a thread waits for ever"
    return found


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


class World:
    """A hub, its spokes, and the rows that arrived."""

    def __init__(self, size: int, on_row: Callable[[Message], None] | None = None) -> None:
        self.rows: list[Message] = []
        self.hub = Hub(size, on_row or self.rows.append)
        made = together(self.hub.accept, *(lambda n=n: Spoke(n, self.hub.address) for n in range(1, size)))
        self.spokes: list[Spoke] = made[1:]
        self.all: list[ControlChannel] = [self.hub, *self.spokes]

    def end(self, status: int = 0) -> list[int]:
        """Let all finish in order; returns the status that each process gets."""
        gathered = together(*(lambda n=n, line=line: line.gather({"rank": n}) for n, line in enumerate(self.all)))
        assert gathered[0] == [{"rank": n} for n in range(len(self.all))]
        return together(*(lambda line=line: line.settle(status) for line in self.all))


def cut(connection: Connection) -> None:
    """Break a connection as the operating system does when a process dies."""
    duplicate = socket.socket(fileno=os.dup(connection.fileno()))
    with duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


def die(hub: Hub) -> None:
    """Let a hub die: it sends nothing more, and all its connections break."""
    hub._outbox.put(None)
    hub._sender.join()
    for connection in hub._ranks:
        cut(connection)


# In order


@pytest.mark.parametrize("size", [2, 4])
def test_every_row_arrives_once_before_the_run_ends(size: int) -> None:
    """500 from each of two threads per process, in the order in which each thread reported them."""
    world = World(size)

    def report(rank: int, thread: int) -> None:
        for n in range(500):
            world.all[rank].report({"rank": rank, "thread": thread, "n": n, "text": "ä" * (n % 50)})

    together(*(lambda rank=rank, thread=thread: report(rank, thread) for rank in range(size) for thread in range(2)))
    assert world.end() == [0] * size
    assert len(world.rows) == size * 1000
    for rank in range(size):
        for thread in range(2):
            mine = [row["n"] for row in world.rows if (row["rank"], row["thread"]) == (rank, thread)]
            assert mine == list(range(500))


def test_rows_are_handled_by_one_thread_at_a_time() -> None:
    """So the keeper of the manifest needs no lock."""
    inside, most = [0], [0]

    def on_row(row: Message) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.001)
        inside[0] -= 1

    world = World(3, on_row)
    together(*(lambda line=line: [line.report({}) for _ in range(30)] for line in world.all))
    world.end()
    assert most == [1]


@pytest.mark.parametrize("status", [0, 1, 143])
def test_every_process_gets_the_status_that_rank_0_decides(status: int, exits: Exits) -> None:
    """None is ended by force, also when connections close afterwards."""
    world = World(3)
    gathered = together(*(lambda n=n, line=line: line.gather({"rank": n}) for n, line in enumerate(world.all)))
    assert gathered == [[{"rank": 0}, {"rank": 1}, {"rank": 2}], [{"rank": 1}], [{"rank": 2}]]
    statuses = [status, 0, 5]  # only that of rank 0 counts
    assert (
        together(*(lambda s=s, line=line: line.settle(s) for s, line in zip(statuses, world.all, strict=True)))
        == [status] * 3
    )
    assert [line.stop for line in world.all] == [None] * 3
    for spoke in world.spokes:
        cut(spoke._connection)
    time.sleep(0.3)
    assert exits.statuses == []
    assert [line.stop for line in world.all] == [None] * 3


def test_rank_0_waits_for_the_slowest_process() -> None:
    """For any time, as long as the process lives."""
    world = World(2)
    came: list[list[Message]] = []
    thread = threading.Thread(target=lambda: came.append(world.hub.gather({"rank": 0})), daemon=True)
    thread.start()
    time.sleep(0.5)
    assert came == []
    world.spokes[0].report({"late": True})
    world.spokes[0].gather({"rank": 1})
    thread.join(10)
    assert came == [[{"rank": 0}, {"rank": 1}]]
    assert world.rows == [{"late": True}]
    assert together(*(lambda line=line: line.settle(0) for line in world.all)) == [0, 0]


# Stopping


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_stop_requested_by_any_process_reaches_all(rank: int) -> None:
    """With its reason and status; the run then ends in order."""
    world = World(3)
    assert [line.stop for line in world.all] == [None] * 3
    world.all[rank].ask_stop(SIGTERM)
    until(lambda: [line.stop for line in world.all] == [SIGTERM] * 3)
    world.all[(rank + 1) % 3].ask_stop(Stop("later", 1))
    assert world.end(143) == [143] * 3
    assert [line.stop for line in world.all] == [SIGTERM] * 3


def test_the_first_stop_that_rank_0_receives_is_that_of_the_run() -> None:
    """All processes ask at once: each has a stop, and rank 0's is one of theirs."""
    world = World(4)
    together(*(lambda n=n, line=line: line.ask_stop(Stop(f"of {n}", n)) for n, line in enumerate(world.all)))
    assert world.end(world.hub.stop.status if world.hub.stop else -1) == [world.hub.stop.status] * 4  # type: ignore[union-attr]
    assert world.hub.stop in [Stop(f"of {n}", n) for n in range(4)]
    assert all(line.stop for line in world.all)


@pytest.mark.parametrize("rank", [0, 1])
def test_requesting_a_stop_never_blocks(rank: int) -> None:
    """Signal handlers request stops while their own thread may hold any lock of the channel."""
    world = World(2)
    with world.hub._row_lock, world.hub._changed:
        began = time.monotonic()
        world.all[rank].ask_stop(SIGTERM)
        assert time.monotonic() - began < 0.1
        until(lambda: world.all[1 - rank].stop == SIGTERM)
    assert world.end() == [0, 0]


def test_an_error_while_handling_a_row_stops_the_run() -> None:
    """Such as a full disk for the manifest; later rows are still handled."""
    taken: list[Message] = []

    def on_row(row: Message) -> None:
        if row["n"] == 1:
            raise OSError("no space")
        taken.append(row)

    world = World(3, on_row)
    for n in range(3):
        world.spokes[0].report({"n": n})
    until(lambda: world.spokes[1].stop)
    assert world.spokes[1].stop == Stop("a row of the manifest was lost: no space", BROKEN)
    assert world.end(BROKEN) == [BROKEN] * 3
    assert taken == [{"n": 0}, {"n": 2}]


# Deaths


def test_a_dead_process_stops_the_run_and_is_reported_missing() -> None:
    """The rows that it sent are kept; rank 0 does not wait for it."""
    world = World(4)
    world.spokes[1].report({"last": "words"})
    until(lambda: world.rows)
    cut(world.spokes[1]._connection)
    until(lambda: all(line.stop for line in world.all))
    left = [world.hub, world.spokes[0], world.spokes[2]]
    assert [line.stop for line in left] == [Stop("the process of rank 2 died", BROKEN)] * 3
    gathered = together(
        *(lambda n=n, line=line: line.gather({"rank": n}) for n, line in zip((0, 1, 3), left, strict=True))
    )
    assert gathered[0] == [{"rank": 0}, {"rank": 1}, {"rank": 3}]
    assert together(*(lambda line=line: line.settle(BROKEN) for line in left)) == [BROKEN] * 3
    assert world.rows == [{"last": "words"}]


def test_a_death_ends_the_wait_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not after a timeout."""
    monkeypatch.setattr(voxquilt.distributed.tcp_channel, "_GRACE", 60.0)
    world = World(2)
    threading.Timer(0.3, cut, [world.spokes[0]._connection]).start()
    assert together(lambda: world.hub.gather({"rank": 0})) == [[{"rank": 0}]]
    assert world.hub.stop == Stop("the process of rank 1 died", BROKEN)
    assert world.hub.settle(BROKEN) == BROKEN


def test_rank_0_waits_only_so_long_for_a_hanging_process_after_a_break() -> None:
    """It is alive but does not end. After a signal, which breaks no connection, the wait is not limited."""
    world = World(3)
    cut(world.spokes[0]._connection)
    until(lambda: world.hub.stop)
    began = time.monotonic()
    assert together(lambda: world.hub.gather({"rank": 0})) == [[{"rank": 0}]]
    assert 0.2 < time.monotonic() - began < 5


def test_a_connection_that_closes_after_the_summary_is_not_a_death() -> None:
    """The process had ended in order."""
    world = World(3)
    world.spokes[0].gather({"rank": 1})
    until(lambda: 1 in world.hub._summaries)
    cut(world.spokes[0]._connection)
    time.sleep(0.1)
    assert world.hub.stop is None
    world.spokes[1].gather({"rank": 2})
    assert world.hub.gather({"rank": 0}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert (world.hub.settle(0), world.spokes[1].settle(0)) == (0, 0)


def test_without_rank_0_processes_stop_and_exit_after_a_grace_period(exits: Exits) -> None:
    """They may finish first; one whose main thread hangs exits with status 1 after the grace period."""
    world = World(3)
    die(world.hub)
    until(lambda: all(spoke.stop for spoke in world.spokes))
    assert [spoke.stop for spoke in world.spokes] == [Stop("the process of rank 0 died", BROKEN)] * 2
    for spoke in world.spokes:
        spoke.report({"to": "nobody"})
        spoke.ask_stop(SIGTERM)
        assert spoke.gather({"rank": 1}) == [{"rank": 1}]
        with pytest.raises(RunError, match="the process of rank 0 died before the run had ended"):
            spoke.settle(0)
    assert exits.asked.wait(5)
    until(lambda: exits.statuses == [BROKEN, BROKEN])


def test_a_stop_requested_before_rank_0_dies_stays_the_reason() -> None:
    """The process's own request is not overwritten."""
    world = World(2)
    world.spokes[0].ask_stop(SIGTERM)
    until(lambda: world.hub.stop)
    die(world.hub)
    assert world.spokes[0]._settled.wait(5)
    assert world.spokes[0].stop == SIGTERM


def test_an_unused_channel_leaves_no_threads_and_connections() -> None:
    """A program may predict many times."""
    before = {*threading.enumerate()}
    world = World(3)
    assert len({*threading.enumerate()} - before) == 6
    world.end()
    del world
    until(lambda: gc.collect() >= 0 and not {*threading.enumerate()} - before)


# Connecting


def test_connections_of_other_programs_are_refused() -> None:
    """With a wrong key or protocol, or closed at once; the run begins all the same."""
    hub = Hub(2, lambda row: None)
    host, port, _ = hub.address

    def wrong_key() -> str:
        try:
            Spoke(1, (host, port, b"x" * 32))
        except RunError as error:
            return str(error)
        return "was let in"

    def stranger(words: bytes) -> None:
        with socket.create_connection((host, port)) as connection:
            connection.sendall(words)

    accepting = threading.Thread(target=hub.accept, daemon=True)
    accepting.start()
    said = together(wrong_key)[0]
    assert said.startswith(f"rank 1 cannot connect to rank 0 at {host}, port {port}: ")
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, os.urandom(300)):
        together(lambda words=words: stranger(words))
    spoke = Spoke(1, hub.address)
    accepting.join(10)
    assert not accepting.is_alive()
    spoke.gather({"rank": 1})
    assert hub.gather({"rank": 0}) == [{"rank": 0}, {"rank": 1}]
    assert together(lambda: hub.settle(0), lambda: spoke.settle(9)) == [0, 0]


def test_a_process_that_never_connects_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 does not wait for ever, and neither does a process without a listening hub."""
    monkeypatch.setattr(voxquilt.distributed.tcp_channel, "_CONNECT", 0.3)
    hub = Hub(4, lambda row: None)
    found = together(lambda: _message(hub.accept), lambda: Spoke(2, hub.address) and None)
    assert found[0].startswith(f"no connection from rank 1, 3 to rank 0 (at 127.0.0.1, port {hub.address[1]}) within")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        said = _message(lambda: Spoke(1, ("127.0.0.1", closed.getsockname()[1], b"x")))
    assert "rank 1 cannot connect to rank 0 at 127.0.0.1" in said
    assert "MASTER_ADDR" in said


def _message(action: Callable[[], object]) -> str:
    with pytest.raises(RunError) as caught:
        action()
    return str(caught.value)


def test_the_address_comes_from_the_launcher_and_the_key_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MASTER_ADDR it is this machine's name."""
    hubs = [Hub(2, lambda row: None) for _ in range(2)]
    addresses = [hub.address for hub in hubs]
    assert {address[0] for address in addresses} == {"127.0.0.1"}
    assert len({address[2] for address in addresses}) == 2
    assert all(len(address[2]) == 32 for address in addresses)
    monkeypatch.delenv("MASTER_ADDR")
    hubs.append(Hub(2, lambda row: None))
    assert hubs[2].address[0] == socket.gethostname()
    for hub in hubs:
        hub._listener.close()


def test_a_single_process_is_its_own_hub() -> None:
    """Rows go straight to the handler, whose errors are raised; the first stop counts."""
    rows: list[Message] = []
    alone = LocalChannel(rows.append)
    assert isinstance(alone, ControlChannel)
    alone.report({"n": 1})
    assert rows == [{"n": 1}]
    assert alone.stop is None
    alone.ask_stop(SIGTERM)
    alone.ask_stop(Stop("later", 1))
    assert alone.stop == SIGTERM
    assert alone.gather({"rank": 0}) == [{"rank": 0}]
    assert alone.settle(3) == 3
    with pytest.raises(ZeroDivisionError):
        LocalChannel(lambda row: 1 / 0 and None).report({})


def test_messages_are_json_so_that_reading_them_runs_no_code() -> None:
    """With pickle the holder of the key could run code."""
    hub = Hub(2, lambda row: None)
    heard: list[bytes] = []

    def spy() -> None:
        with Client(hub.address[:2], family="AF_INET", authkey=hub.address[2]) as connection:
            connection.send_bytes(json.dumps({"rank": 1}).encode())
            heard.append(connection.recv_bytes())

    together(hub.accept, lambda: (hub.ask_stop(SIGTERM), spy()))
    until(lambda: heard)
    assert json.loads(heard[0]) == {"stop": ["SIGTERM", 143]}
