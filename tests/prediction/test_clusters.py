"""Tests runs started by torchrun, SLURM's srun and Hydra's launchers: processes form one run with one manifest."""

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from forks import Server
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.plugins.environments import SLURMEnvironment
from synthetic import ROOT, noise, read, run, save

from voxquilt.cli.instantiate import build
from voxquilt.cli.main import conf_dir
from voxquilt.cli.plain_config import to_plain
from voxquilt.cli.process_check import check_trainer
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.distributed.environment import is_first, slurm_tasks
from voxquilt.errors import ConfigError

ARGUMENTS = (
    "data.inputs=scans", "model=state_dict", "model.net._target_=synthetic.Touchy", "ckpt_path=null",
    "data.patch_size=8", "data.patch_overlap=4", "trainer.accelerator=cpu",
    "callbacks.writer.tensorboard=false", "callbacks.writer.report=false",
)  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the cluster variables of the machine the tests run on; restored after each test."""
    for name in os.environ:
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("RANK", "LOCAL_RANK", "NODE_RANK", "MASTER_PORT"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_NAME", "none")  # so that it is restored


@pytest.fixture
def volumes(tmp_path: Path) -> dict[str, np.ndarray]:
    """Five scans of different lengths, none of which the network rejects."""
    found = {name: np.minimum(noise((9, 9, 24 - 3 * n), n), 60) for n, name in enumerate("abcde")}
    return {name: save(tmp_path / f"scans/{name}.nii", volume) for name, volume in found.items()}


def slurm(task: int, **others: str) -> dict[str, str]:
    """Variables that srun sets for one of two tasks on one node."""
    return {
        "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "predict", "SLURM_NNODES": "1", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0", "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task), **others,
    }  # fmt: skip


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def together(commands: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]], cwd: Path) -> list[int]:
    """Run Python processes at the same time; returns their exit statuses, and pytest prints their output."""
    shared = {"PYTHONPATH": str(ROOT / "tests"), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen([sys.executable, *command], cwd=cwd, env=os.environ | shared | env))
            for command, env in zip(commands, envs, strict=True)
        ]
        stack.callback(lambda: [process.kill() for process in processes])
        return [process.wait(90) for process in processes]


def rows(folder: Path, name: str = "manifest.csv") -> list[dict[str, str]]:
    with open(folder / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def are_right(folder: Path, volumes: Mapping[str, np.ndarray]) -> bool:
    """Whether the labels are those of the network and the folder holds nothing but the files of one run."""
    for name, volume in volumes.items():
        np.testing.assert_array_equal(read(folder / f"{name}_labels.nii.gz"), volume > 50)
    found = {path.name for path in folder.iterdir()} - {f"{name}_labels.nii.gz" for name in volumes}
    return found == {"labels.ctbl", "labels.txt", "manifest.csv", "run.json", "statistics.csv"}


# Configuration


def composed(*overrides: str) -> dict[str, object]:
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        wanted = ["data.inputs=x", "data.patch_size=8", "model=torchscript", "ckpt_path=null", *overrides]
        return to_plain(compose("predict", wanted))


@pytest.mark.parametrize(
    ("overrides", "world"),
    [
        (("trainer=cpu",), 1), (("trainer=cpu", "trainer.devices=2"), 2), (("trainer=ddp",), 1),
        (("trainer=ddp", "trainer.devices=2", "trainer.num_nodes=3"), 6),
        (("trainer=ddp", "trainer.devices=2", "trainer.strategy=ddp_spawn"), 2),
    ],
)  # fmt: skip
def test_lightning_builds_every_trainer_group(overrides: Sequence[str], world: int) -> None:
    """With the configured number of processes and all keys of default.yaml."""
    node = composed("trainer.accelerator=cpu", *overrides)["trainer"]
    assert isinstance(node, dict)
    default = composed()["trainer"]
    assert isinstance(default, dict)
    assert node.keys() == default.keys()
    assert build(node, "trainer", logger=False).world_size == world


def test_a_missing_gpu_is_one_message() -> None:
    """trainer=gpu is built, or the message says what is missing."""
    node = composed("trainer=gpu", "trainer.devices=99")["trainer"]
    assert isinstance(node, dict)
    with pytest.raises(ConfigError, match="trainer cannot be built"):
        build(node, "trainer", logger=False)


def test_trainer_slurm_counts_tasks_and_nodes_and_handles_no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks on each of two nodes are six processes; requeueing, which would handle SIGUSR1, is off."""
    job = slurm(0, SLURM_NTASKS="6", SLURM_NTASKS_PER_NODE="3", SLURM_NNODES="2")
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    node = composed("trainer=slurm", "trainer.accelerator=cpu")["trainer"]
    assert isinstance(node, dict)
    check_trainer(node, 1, multirun=True)
    trainer = build(node, "trainer", logger=False)
    environment = trainer.strategy.cluster_environment
    assert (trainer.world_size, trainer.num_nodes) == (6, 2)
    assert isinstance(environment, SLURMEnvironment)
    assert environment.auto_requeue is False
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    with pytest.raises(ConfigError, match="salloc --job-name=predict"):
        check_trainer(node, 1, multirun=False)
    monkeypatch.delenv("SLURM_NNODES")
    with pytest.raises(ConfigError, match="SLURM_NNODES"):
        composed("trainer=slurm")


@pytest.mark.parametrize(
    ("trainer", "refusal"),
    [
        ({"devices": 2}, None), ({"devices": "2"}, None), ({"devices": [0, 1]}, None), ({"devices": "0,1"}, None),
        ({"devices": 1, "num_nodes": 2}, None), ({"devices": "auto"}, None),
        ({"devices": 1}, "make 1 process: each task would"), ({"devices": "0,"}, "make 1 process: "),
        ({"devices": 2, "num_nodes": 2}, "make 4 processes"), ({"num_nodes": "two"}, "trainer.num_nodes must be"),
    ],
)  # fmt: skip
def test_the_trainer_must_have_as_many_processes_as_slurm_has_tasks(
    trainer: dict[str, object], refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However devices are written; else the message names both counts and two remedies."""
    for name, value in slurm(1).items():
        monkeypatch.setenv(name, value)
    if refusal is None:
        check_trainer(trainer, 1, multirun=True)
        assert slurm_tasks() == 2
        assert not is_first()
        return
    with pytest.raises(ConfigError, match=refusal):
        check_trainer(trainer, 1, multirun=False)


def test_torchrun_under_srun_counts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's tasks are then torchrun's agents, one per node."""
    for name, value in slurm(1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    check_trainer({"devices": 4, "num_nodes": 2}, 1, multirun=True)


def test_a_sweep_over_processes_that_rerun_the_command_is_refused(tmp_path: Path) -> None:
    """Before anything is written; the message has two remedies, one of which is then accepted."""
    save(tmp_path / "scans/a.nii", noise((9, 9, 9)))
    done = run("predict.py", *ARGUMENTS, "--multirun", "trainer.devices=2", "output_dir=x,y", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("voxquilt: --multirun with trainer.devices=2: each process of ddp would") == 2
    assert "trainer.strategy=ddp_spawn" in done.stderr
    assert "hydra/launcher=submitit_slurm" in done.stderr
    assert not any((tmp_path / name).exists() for name in "xy")
    check_trainer({"devices": 2, "strategy": "ddp_spawn"}, 1, multirun=True)
    done = run("predict.py", *ARGUMENTS, cwd=tmp_path, env=slurm(0))
    assert (done.returncode, done.stdout) == (2, "")
    assert "voxquilt: SLURM started 2 tasks, but trainer.devices and trainer.num_nodes make 1 process" in done.stderr
    assert "shard.index=$SLURM_PROCID" in done.stderr
    assert not (tmp_path / "outputs").exists()


# Sweeps


def test_the_status_of_a_sweep_is_that_of_its_worst_run(
    forks: Server, tmp_path: Path, volumes: dict[str, np.ndarray]
) -> None:
    """0 if every shard is done, 1 if a subject failed, 2 if one run was not started; -m may be anywhere."""
    done = run("predict.py", *ARGUMENTS, "--multirun", "shard.count=2", "shard.index=0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [row["subject"] for n in range(2) for row in rows(tmp_path / "outputs", f"manifest_{n}_of_2.csv")]
    assert sorted(found) == sorted(volumes)
    save(tmp_path / "scans/f.nii", np.full((9, 9, 9), 77, np.int16))
    done = forks.run("-m", *ARGUMENTS, "data.inputs=scans/f.nii,scans/a.nii", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    found = [row for path in (tmp_path / "outputs").glob("data.inputs-*") for row in rows(path)]
    assert {row["subject"]: row["status"] for row in found} == {"f": "failed", "a": "done"}
    done = forks.run(*ARGUMENTS, "shard.count=2", "shard.index=0,2", "-m", cwd=tmp_path)
    assert done.returncode == 2
    assert "shard.index=2 is not below" in done.stderr
    done = forks.run(*ARGUMENTS, "data.patch_siz=8,9", "-m", cwd=tmp_path)
    assert done.returncode == 2


def test_a_sweep_by_submitit_returns_the_status_of_its_jobs(tmp_path: Path) -> None:
    """Local jobs, run as on a cluster: they import from the user's folder, and status 1 comes back."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra `slurm` is not installed")
    good = save(tmp_path / "scans/good.nii", np.minimum(noise((9, 9, 9)), 60))
    save(tmp_path / "scans/bad.nii", np.full((9, 9, 9), 77, np.int16))
    (tmp_path / "beside.py").write_text("from synthetic import Touchy\n")
    network = "model.net._target_=beside.Touchy"
    done = run("predict.py", *ARGUMENTS, network, "-m", "hydra/launcher=submitit_local", cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert {row["subject"]: row["status"] for row in rows(tmp_path / "outputs")} == {"good": "done", "bad": "failed"}
    np.testing.assert_array_equal(read(tmp_path / "outputs/good_labels.nii.gz"), good > 50)
    done = run("predict.py", *ARGUMENTS, "hydra/launcher=submitit_slurm", "--cfg", "hydra", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "_target_: hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher" in done.stdout


# Runs of several processes


def test_the_tasks_of_srun_form_one_run(
    tmp_path: Path, volumes: dict[str, np.ndarray], capfd: pytest.CaptureFixture[str]
) -> None:
    """Each subject once, one manifest, status 0 from both. As shards, each task has its own manifest."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    command = [str(ROOT / "predict.py"), *ARGUMENTS]
    tasks = [slurm(task, **meeting) for task in range(2)]
    assert together([[*command, "trainer=slurm", "run.distribute=auto"]] * 2, tasks, tmp_path) == [0, 0]
    found = rows(tmp_path / "outputs")
    assert sorted((row["subject"], row["status"]) for row in found) == [(name, "done") for name in volumes]
    assert are_right(tmp_path / "outputs", volumes)
    record = json.loads((tmp_path / "outputs/run.json").read_text())
    assert (record["processes"], len(record["ranks"]), record["exit_status"]) == (2, 2, 0)
    assert capfd.readouterr().out.count("subjects done; see") == 1

    shards = ["shard.count=${oc.env:SLURM_NTASKS}", "shard.index=${oc.env:SLURM_PROCID}", "output_dir=shards"]
    assert together([[*command, *shards]] * 2, tasks, tmp_path) == [0, 0]
    parts = [rows(tmp_path / "shards", f"manifest_{n}_of_2.csv") for n in range(2)]
    assert all(parts)
    assert sorted(row["subject"] for part in parts for row in part) == sorted(volumes)
    records = [json.loads((tmp_path / f"shards/run_{n}_of_2.json").read_text()) for n in range(2)]
    assert [(record["processes"], record["exit_status"]) for record in records] == [(1, 0), (1, 0)]
    assert capfd.readouterr().out.count("subjects done; see") == 2


@pytest.mark.parametrize("distribute", ["subject", "slab"])
def test_two_agents_of_torchrun_form_one_run(distribute: str, tmp_path: Path, volumes: dict[str, np.ndarray]) -> None:
    """Two nodes: the files of one process, each subject once; a failed subject gives both agents status 1."""
    if distribute == "subject":
        save(tmp_path / "scans/f.nii", np.full((9, 9, 9), 77, np.int16))
    meeting = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port()}"]
    command = [str(ROOT / "predict.py"), *ARGUMENTS, "trainer.num_nodes=2", f"run.distribute={distribute}"]
    agents = [[*TORCHRUN, "1", *meeting, f"--node-rank={rank}", *command] for rank in range(2)]
    statuses = together(agents, [{}, {}], tmp_path)
    assert statuses == ([1, 1] if distribute == "subject" else [0, 0])
    found = {row["subject"]: row["status"] for row in rows(tmp_path / "outputs")}
    assert len(rows(tmp_path / "outputs")) == len(found)
    assert found.pop("f", "failed") == "failed"
    assert found == dict.fromkeys(volumes, "done")
    assert are_right(tmp_path / "outputs", volumes)
    assert json.loads((tmp_path / "outputs/run.json").read_text())["processes"] == 2


def test_torchrun_on_one_machine_needs_only_the_number_of_processes(
    tmp_path: Path, volumes: dict[str, np.ndarray], capfd: pytest.CaptureFixture[str]
) -> None:
    """The files are the same, and everything is printed once."""
    command = [*TORCHRUN, "2", "--standalone", str(ROOT / "predict.py"), *ARGUMENTS, "trainer.devices=2"]
    assert together([command], [{}], tmp_path) == [0]
    assert are_right(tmp_path / "outputs", volumes)
    said = capfd.readouterr()
    assert said.out.count("subjects done; see") == 1
    assert said.out.count("a: done: ") == 1
    assert "voxquilt: " not in said.err
