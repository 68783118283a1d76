"""Implements the control channel over TCP: every process has a connection to rank 0."""

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from queue import SimpleQueue
from time import monotonic
from typing import Any

from voxquilt.distributed.control_channel import BROKEN, Message, Stop
from voxquilt.errors import RunError

# Seconds in which a process has to end by itself after rank 0 has died, and that rank 0 waits after a failure.
_GRACE = 20.0
# Seconds in which all processes have to connect; they come from a collective operation, so that none is late.
_CONNECT = 300.0


class Hub:
    """Rank 0's end of the channel.

    Args:
        size: Number of processes.
        on_report: Takes the reports of all ranks; called by one thread at a time.
        decode: Makes a report of its message.
    """

    def __init__(
        self, size: int, on_report: Callable[[Any], None], decode: Callable[[Message], Any] = lambda message: message
    ) -> None:
        self.stop: Stop | None = None
        self._size = size
        self._on_report, self._decode = on_report, decode
        self._row_lock = threading.Lock()
        self._key = secrets.token_bytes(32)
        self._host = os.environ.get("MASTER_ADDR", socket.gethostname())
        # All interfaces if ranks of other nodes are to connect; clients without the key are refused.
        interface = self._host if self._host in ("127.0.0.1", "localhost") else ""
        self._listener = Listener((interface, 0), family="AF_INET", backlog=size, authkey=self._key)
        self._ranks: dict[Connection, int] = {}
        self._summaries: dict[int, Message] = {}
        self._dead: set[int] = set()
        self._changed = threading.Condition()
        # Emptied by a thread of its own, so that a signal handler never waits for a lock that its own thread holds.
        self._outbox: SimpleQueue[Message | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, daemon=True, name="voxquilt-channel-out")

    @property
    def address(self) -> tuple[str, int, bytes]:
        """Host, port and key that the other ranks connect with."""
        return self._host, int(self._listener.address[1]), self._key

    def accept(self) -> None:
        """Wait until every other rank has connected.

        Raises:
            RunError: a rank has not connected in time.
        """
        # A thread, since neither a connection nor its first message can be awaited with a time limit.
        thread = threading.Thread(target=self._accept, daemon=True, name="voxquilt-channel-accept")
        thread.start()
        thread.join(_CONNECT)
        if absent := {*range(1, self._size)} - {*self._ranks.values()}:
            raise RunError(
                f"no connection from rank {', '.join(map(str, sorted(absent)))} to rank 0 (at {self.address[0]}, port "
                f"{self.address[1]}) within {_CONNECT:.0f} s; is there a firewall, or is MASTER_ADDR wrong?"
            )
        threading.Thread(target=self._receive_all, daemon=True, name="voxquilt-channel-in").start()
        self._sender.start()

    def _accept(self) -> None:
        while len(self._ranks) < self._size - 1:
            # Another client, such as a port scan, sends no key or invalid data, or disconnects.
            with contextlib.suppress(AuthenticationError, EOFError, OSError):
                connection = self._listener.accept()
                rank = json.loads(connection.recv_bytes())["rank"]
                _set_options(connection)
                self._ranks[connection] = rank
        self._listener.close()

    def ask_stop(self, stop: Stop) -> None:
        if self.stop is None:
            self.stop = stop
            self._outbox.put({"stop": [stop.reason, stop.status]})

    def report(self, report: Any) -> None:
        with self._row_lock:
            self._on_report(report)

    def gather(self, summary: Message) -> list[Message]:
        began = monotonic()
        with self._changed:
            while len(self._summaries) + len(self._dead) < self._size - 1:
                self._changed.wait(1.0)
                # After a failure others may hang, so that the wait is limited.
                if self.stop and self.stop.status == BROKEN and monotonic() - began > _GRACE:
                    break
            return [summary, *(self._summaries[rank] for rank in sorted(self._summaries))]

    def settle(self, status: int) -> int:
        self._outbox.put({"status": status})
        self._outbox.put(None)
        self._sender.join(_GRACE)
        return status

    def _receive_all(self) -> None:
        connections = list(self._ranks)
        while connections:
            for connection in wait(connections):
                assert isinstance(connection, Connection)
                rank = self._ranks[connection]
                try:
                    self._take(rank, json.loads(connection.recv_bytes()))
                except (EOFError, OSError):
                    connections.remove(connection)
                    if rank not in self._summaries:
                        self.ask_stop(Stop(f"the process of rank {rank} died", BROKEN))
                    with self._changed:
                        self._dead |= {rank} - self._summaries.keys()
                        self._changed.notify_all()

    def _take(self, rank: int, message: Message) -> None:
        if "report" in message:
            try:
                self.report(self._decode(message["report"]))
            except Exception as error:  # such as a full disk
                self.ask_stop(Stop(f"a row of the manifest was lost: {error}", BROKEN))
        elif "stop" in message:
            self.ask_stop(Stop(*message["stop"]))
        else:
            with self._changed:
                self._summaries[rank] = message["end"]
                self._changed.notify_all()

    def _send_all(self) -> None:
        while (message := self._outbox.get()) is not None:
            for connection in self._ranks:
                _send(connection, message)


class Spoke:
    """Another rank's end of the channel.

    Args:
        rank: The rank.
        address: Rank 0's `Hub.address`.
        encode: Makes a message of a report.

    Raises:
        RunError: rank 0 cannot be reached.
    """

    def __init__(
        self, rank: int, address: tuple[str, int, bytes], encode: Callable[[Any], Message] = lambda report: report
    ) -> None:
        self._encode = encode
        self.stop: Stop | None = None
        self._status: int | None = None
        self._settled = threading.Event()
        host, port, key = address
        try:
            self._connection = Client((host, port), family="AF_INET", authkey=key)
            _set_options(self._connection)
            self._connection.send_bytes(json.dumps({"rank": rank}).encode())
        except (OSError, EOFError, AuthenticationError) as error:
            raise RunError(
                f"rank {rank} cannot connect to rank 0 at {host}, port {port}: {error}; is there a firewall, or is "
                f"MASTER_ADDR wrong?"
            ) from error
        self._outbox: SimpleQueue[Message | None] = SimpleQueue()
        threading.Thread(target=self._receive_all, daemon=True, name="voxquilt-channel-in").start()
        threading.Thread(target=self._send_all, daemon=True, name="voxquilt-channel-out").start()

    def ask_stop(self, stop: Stop) -> None:
        if self.stop is None:
            self.stop = stop
            self._outbox.put({"stop": [stop.reason, stop.status]})

    def report(self, report: Any) -> None:
        self._outbox.put({"report": self._encode(report)})

    def gather(self, summary: Message) -> list[Message]:
        self._outbox.put({"end": summary})
        return [summary]

    def settle(self, status: int) -> int:
        self._settled.wait()
        self._outbox.put(None)
        if self._status is None:
            raise RunError("the process of rank 0 died before the run had ended.")
        return self._status

    def _receive_all(self) -> None:
        try:
            while self._status is None:
                message = json.loads(self._connection.recv_bytes())
                if "stop" in message:
                    self.stop = self.stop or Stop(*message["stop"])
                else:
                    self._status = message["status"]
        except (EOFError, OSError):
            self.stop = self.stop or Stop("the process of rank 0 died", BROKEN)
            # The main thread may be in a forward pass of minutes, or wait for a rank that has died as well.
            timer = threading.Timer(_GRACE, os._exit, (BROKEN,))
            timer.daemon = True
            timer.start()
        self._settled.set()

    def _send_all(self) -> None:
        while (message := self._outbox.get()) is not None and _send(self._connection, message):
            pass


def _send(connection: Connection, message: Mapping[str, Any]) -> bool:
    try:
        connection.send_bytes(json.dumps(message).encode())
    except OSError:  # the connection is broken, which the receiving thread notices too
        return False
    return True


def _set_options(connection: Connection) -> None:
    """Have the operating system notice within a minute that the other machine has vanished, and send short messages
    at once: a delayed acknowledgement takes 40 ms."""
    duplicate = socket.socket(fileno=os.dup(connection.fileno()))
    with duplicate:
        duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):  # not on every system
                duplicate.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
