r"""Starts runs of predict.py without delay, by forking a process that has imported everything.

Several such processes form a run as torchrun would start it. Signals, deaths and exit statuses are real.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
MARK = "VOXQUILT_TEST_RUN"


@dataclass
class Run:
    """Processes of one run, by rank."""

    server: "Server"
    pids: list[int]
    logs: list[Path]
    mark: str
    began: float = field(default_factory=time.monotonic)

    def wait(self, timeout: float = 60) -> list[int]:
        """Wait for the exit statuses, negative for a signal; a process that exceeds the time is killed."""
        statuses = [self.server.ask({"wait": pid, "timeout": timeout})["status"] for pid in self.pids]
        self.seconds = time.monotonic() - self.began
        assert None not in statuses, f"still running after {timeout} s: {self.text}"
        return statuses

    @property
    def text(self) -> str:
        """Everything that all processes printed."""
        return "".join(log.read_text(errors="replace") for log in self.logs)

    def until(self, path: Path, text: str = "", timeout: float = 30) -> None:
        """Wait until a file exists and contains a text."""
        end = time.monotonic() + timeout
        while not (path.exists() and text in path.read_text(errors="replace")):
            assert time.monotonic() < end, f"{path} has no {text!r}: {self.text}"
            time.sleep(0.01)

    def orphans(self) -> list[int]:
        """Processes of this run that are still alive."""
        return alive(self.mark)


def alive(mark: str) -> list[int]:
    """Processes whose environment has the mark of a run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


class Server:
    """The process that forks."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and read the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def run(
        self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run predict.py in one process; returns stdout and stderr separately, as subprocess.run does."""
        with tempfile.TemporaryDirectory() as folder:
            job = self.start(*arguments, cwd=cwd, env=env, apart=Path(folder))
            (status,) = job.wait(120)
            errors = (Path(folder) / "errors").read_text(errors="replace")
            return subprocess.CompletedProcess(arguments, status, job.text, errors)

    def start(
        self,
        *arguments: str,
        cwd: Path,
        ranks: int = 1,
        env: Mapping[str, str] | None = None,
        script: str = "predict",
        apart: Path | None = None,
    ) -> Run:
        r"""Start a run of predict.py or train.py with `ranks` processes.

        Their output goes to files in `cwd`, or to files in `apart`, where stderr is separate.
        """
        mark, port = uuid.uuid4().hex, free_port()
        logs, pids = [(apart or cwd) / f"log_{mark}_{rank}.txt" for rank in range(ranks)], []
        for rank, log in enumerate(logs):
            world = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0",
                "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "test",
            }  # fmt: skip
            request = {
                "arguments": [*arguments, *([f"trainer.devices={ranks}", "trainer.accelerator=cpu"] * (ranks > 1))],
                "cwd": str(cwd), "log": str(log), "errors": str(apart / "errors" if apart else log), "script": script,
                "env": {MARK: mark, "SLOW": os.environ.get("SLOW", "0"), **(world if ranks > 1 else {}), **(env or {})},
            }  # fmt: skip
            pids.append(self.ask(request)["pid"])
        return Run(self, pids, logs, mark)

    def close(self) -> None:
        """End the process that forks."""
        self._process.kill()
        with self._process:  # closes its pipes
            pass


def free_port() -> int:
    """A port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve() -> None:
    import lightning.pytorch
    import synthetic

    import voxquilt.cli.main
    import voxquilt.cli.predict_run
    import voxquilt.cli.train_run
    import voxquilt.distributed.child_processes
    import voxquilt.prediction.writer_callback
    import voxquilt.reporting.tables

    _ = (
        lightning.pytorch,
        synthetic,
        voxquilt.cli.train_run,
        voxquilt.distributed.child_processes,
        voxquilt.reporting.tables,
        voxquilt.prediction.writer_callback,
    )
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"status": _waited(request["wait"], request["timeout"])}
        else:
            answer = {"pid": _forked(request, getattr(voxquilt.cli.main, request["script"]))}
        print(json.dumps(answer), flush=True)


def _forked(request: Mapping[str, Any], main: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.chdir(request["cwd"])
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where pytest runs in the background
        os.environ.update(request["env"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
        apart = request["errors"] != request["log"]
        os.dup2(os.open(request["errors"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC) if apart else 1, 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # as on a terminal, beside stderr
        if encoding := request["env"].get("PYTHONIOENCODING"):  # which is read when an interpreter starts
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(encoding=encoding, errors="strict")  # type: ignore[union-attr]
        sys.argv = [str(ROOT / f"{request['script']}.py"), *request["arguments"]]
        status = _status(main)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(main: Any) -> int:
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _waited(pid: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        select.select([], [], [], 0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def checked(statuses: Sequence[int]) -> int:
    """The exit status that all processes of a run have in common."""
    assert len(set(statuses)) == 1, statuses
    return statuses[0]


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """A running server, for a fixture."""
    found = Server()
    try:
        yield found
    finally:
        found.close()


if __name__ == "__main__":
    _serve()
