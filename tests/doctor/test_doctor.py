"""Tests voxquilt doctor: what is wrong on a machine is a line with advice, and no line names people or folders."""

import getpass
import json
import re
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import voxquilt.doctor.devices as devices
import voxquilt.doctor.examination as examination
import voxquilt.doctor.machine as machine
import voxquilt.doctor.processes as processes
import voxquilt.doctor.versions as versions
from voxquilt.doctor.command import main
from voxquilt.doctor.examination import examine
from voxquilt.doctor.line import NOTE, OK, PROBLEM, Line, hidden
from voxquilt.doctor.machine import core_limit

Usage = namedtuple("Usage", "total used free")


def line_of(lines: Any, topic: str) -> Line:
    (found,) = (line for line in lines if line.topic == topic)
    return found


def test_the_command_says_that_this_machine_works() -> None:
    """In under 5 seconds, of which most is torch's import; as `voxquilt` does, whose entry point is the same."""
    began = perf_counter()
    ran = subprocess.run(
        [sys.executable, "-m", "voxquilt", "doctor", "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    seconds = perf_counter() - began
    content = json.loads(ran.stdout)
    assert (ran.returncode, content["ok"], ran.stderr) == (0, True, "")
    states = {line["topic"]: line["state"] for line in content["lines"]}
    assert states["processes"] == OK
    assert {"python", "packages", "cuda", "memory", "shared memory", "disk", "temporary folder"} <= states.keys()
    assert seconds < 10  # under 5 by itself; tests run side by side


def test_no_line_names_the_user_the_machine_or_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """But for those that are the same everywhere."""
    with pytest.raises(SystemExit):
        main(["doctor"])
    text = capsys.readouterr().out
    assert str(Path.home()) not in text
    assert socket.gethostname() not in text
    assert re.findall(r"(?<![\w~.])/[a-z]\w+", text.replace("/dev/shm", "")) == []


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,12}", fullmatch=True)


@given(st.lists(names, min_size=1, max_size=5), names, st.sampled_from(["{}", "cannot open '{}'", "in {}: 3", "({})"]))
def test_of_a_path_only_the_last_name_is_left(folders: list[str], name: str, text: str) -> None:
    """Wherever it stands in the text of an error."""
    path = "/" + "/".join([*folders, name])
    if folders[0] == "dev":
        return
    shown = hidden(text.format(path))
    assert path not in shown
    assert shown in (text.format(f".../{name}"), hidden(text.format(f".../{name}")))


def test_the_home_folder_the_user_and_the_machine_have_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """As words of their own; a part of another word is not touched."""
    monkeypatch.setenv("HOME", "/home/fatima")
    monkeypatch.setattr(getpass, "getuser", lambda: "fatima")
    monkeypatch.setattr(socket, "gethostname", lambda: "node17")
    text = "/home/fatima/net.pt of fatima at node17, not node170 nor fatimas"
    assert hidden(text) == "~/net.pt of <user> at <machine>, not node170 nor fatimas"


def test_processes_that_cannot_meet_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the exit status is 1."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError(f"cannot resolve {socket.gethostname()}")

    monkeypatch.setattr(dist, "ProcessGroupGloo", refuse)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    printed = capsys.readouterr().out
    assert ended.value.code == 1
    assert "problem  processes" in printed
    assert "1 problem" in printed.splitlines()[-1]
    assert "cannot resolve <machine>. Does the machine's own name resolve" in printed


def test_a_check_that_fails_is_a_problem_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that nobody has thought of."""

    def check_nothing() -> Any:
        raise KeyError("what")

    monkeypatch.setattr(examination, "check_devices", check_nothing)
    lines = examine()
    assert line_of(lines, "nothing").state == PROBLEM
    assert line_of(lines, "disk").state == OK


def test_little_shared_memory_is_a_note_and_a_problem_between_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """64 MiB is what Docker gives."""
    (tmp_path / "dev/shm").mkdir(parents=True)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(2**26, 0, 2**26 - 2**20))
    for count, state in ((0, NOTE), (2, PROBLEM)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        found = line_of(machine._check_shared_memory(tmp_path), "shared memory")
        assert found.state == state
        assert "--shm-size" in found.advice


def test_limits_of_a_container_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores of both versions of cgroups, and threads that are more than these."""
    assert core_limit(tmp_path) is None
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    assert core_limit(tmp_path) is None
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n")
    assert core_limit(tmp_path) == 0.5
    (tmp_path / "sys/fs/cgroup/cpu.max").unlink()
    (tmp_path / "sys/fs/cgroup/cpu").mkdir()
    (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us").write_text("100000\n")
    assert core_limit(tmp_path) == 1.5
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    found = line_of(machine.check_machine(tmp_path), "cores")
    assert (found.state, "OMP_NUM_THREADS=1." in found.advice) == (NOTE, True)


def test_a_folder_that_may_not_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The working folder and the temporary one; a cache is a note, since not everybody needs it."""
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    monkeypatch.setenv("VOXQUILT_CACHE", str(tmp_path))
    lines = list(machine.check_machine())
    assert [line.topic for line in lines if line.state == PROBLEM] == ["disk", "temporary folder"]
    cache = line_of(lines, "cache of examples")
    assert (cache.state, cache.text) == (NOTE, "VOXQUILT_CACHE")


def test_a_version_that_is_too_old_is_a_problem_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two of Lightning's were malware."""
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: "2.6.3" if name == "lightning" else real(name))
    found = line_of(versions.check_versions(), "packages")
    assert found.state == PROBLEM
    assert "lightning<2.7,>=2.6.6 (it is 2.6.3): pip install 'lightning<2.7,>=2.6.6'" in found.advice


@pytest.mark.parametrize(("has_gpu", "state"), [(True, PROBLEM), (False, NOTE)])
def test_a_cudnn_that_computes_wrongly_is_a_problem_where_it_is_used(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, state: str
) -> None:
    """9.8 to 9.10, in bfloat16."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    found = versions._check_cuda()
    assert (found.state, "cuDNN 9.10.2" in found.text, "nvidia-cudnn" in found.advice) == (state, True, True)


def test_a_device_that_cannot_be_used_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others have lines of their own."""

    def properties(n: int) -> Any:
        raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(devices, "kernels_run_on", lambda _: False)
    lines = list(devices.check_devices())
    assert [line.state for line in lines if line.topic.startswith("gpu")] == [PROBLEM, PROBLEM]
    assert line_of(lines, "kernels").state == NOTE
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    assert line_of(processes.check_processes(), "between gpus").state == NOTE
