"""Tests the environment of a process: whether it prints, which launcher started it, and how signals are handled."""

import os
import signal
import subprocess
import sys
import time

import pytest

from voxquilt.distributed.environment import is_external, is_first, slurm_tasks
from voxquilt.distributed.signals import Signals

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}
SLURM = {"SLURM_JOB_NAME": "job", "SLURM_NTASKS": "4"}
KEYS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "SLURM_NTASKS",
        "SLURM_JOB_NAME", "SLURM_PROCID", "SLURM_LOCALID", "VOXQUILT_PARENT")  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "first", "external", "tasks"),
    [
        ({}, True, False, 1),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True, False, 1),
        ({"LOCAL_RANK": "1"}, False, False, 1),  # started by Lightning
        ({"NODE_RANK": "1"}, False, False, 1),  # by hand, on a second machine
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}, True, True, 1),
        (TORCHRUN | {"RANK": "2", "LOCAL_RANK": "0"}, False, True, 1),  # first of its machine only
        (SLURM | {"SLURM_PROCID": "0"}, True, True, 4),
        (SLURM | {"SLURM_PROCID": "3", "LOCAL_RANK": "0"}, False, True, 4),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, True, False, 1),
        (SLURM | {"SLURM_JOB_NAME": "interactive", "SLURM_PROCID": "3"}, True, False, 1),  # a shell inside a job
        (SLURM | {"SLURM_JOB_NAME": "bash"}, True, False, 1),
        ({"SLURM_JOB_NAME": "job"}, True, False, 1),
    ],
)
def test_environment_variables_tell_the_printing_rank_and_the_launcher(
    environment: dict[str, str], first: bool, external: bool, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of Lightning, torchrun and SLURM."""
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert (is_first(), is_external(), slurm_tasks()) == (first, external, tasks)


_CHILD = """
import os, sys, time
from voxquilt.distributed.environment import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""
_PARENT = """
import os, subprocess, sys, time
from voxquilt.distributed.environment import end_with_parent
end_with_parent()
if sys.argv[1] == "by hand":
    del os.environ["VOXQUILT_PARENT"]
pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]], text=True, **pipes)
print(child.stdout.readline(), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("how", ["by us", "by hand"])
def test_a_process_of_a_run_ends_with_the_parent_that_started_it(how: str) -> None:
    """A command put into the background by hand outlives its shell."""
    done = subprocess.run([sys.executable, "-c", _PARENT, how, _CHILD], capture_output=True, text=True, timeout=30)
    child = int(done.stdout)
    end = time.monotonic() + (10 if how == "by us" else 1.5)
    try:
        while time.monotonic() < end and alive(child):
            time.sleep(0.02)
        assert alive(child) == (how == "by hand")
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_held_signals_become_requests_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the exit status of its signal; the previous handlers are restored afterwards."""
    asked: list[tuple[str, int]] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signals = Signals(lambda name, status: asked.append((name, status)))
    signals.hold()
    try:
        for number in before:
            os.kill(os.getpid(), number)
    finally:
        signals.release()
    assert asked == [("SIGTERM", 143), ("SIGINT", 130)]
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_second_ctrl_c_after_some_seconds_exits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An immediate second SIGINT comes from a launcher that forwards its group's; SIGTERM only ever requests a stop."""
    asked: list[str] = []
    exits: list[int] = []
    now = [100.0]
    monkeypatch.setattr("voxquilt.distributed.signals.monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", exits.append)
    signals = Signals(lambda name, status: asked.append(name))
    signals.hold()
    try:
        for later, number in ((0, signal.SIGINT), (1, signal.SIGINT), (3, signal.SIGTERM)):
            now[0] = 100.0 + later
            os.kill(os.getpid(), number)
        assert exits == []
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signals.release()
    assert exits == [130]
    assert asked[:3] == ["SIGINT", "SIGINT", "SIGTERM"]
