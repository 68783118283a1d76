"""Tests MLflow, Weights & Biases and Optuna, as far as they are installed: `make extras` has them in an environment."""

import sqlite3
from pathlib import Path

import logged_runs
import numpy as np
import pytest
import torch
import yaml
from forks import Server, checked
from logged_runs import save_labelled
from PIL import Image

from voxquilt.reporting.manifest import read_rows

JOB = (
    "data.inputs=in", "model=state_dict", "model.net._target_=synthetic.Over50", "ckpt_path=null", "data.patch_size=8",
    "trainer=cpu", "output_dir=out", "callbacks.writer.tensorboard=false", "callbacks.writer.overlay=true",
)  # fmt: skip
TRAIN = (*logged_runs.TRAIN, "trainer.max_epochs=1")
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return save_labelled(tmp_path)


def run(forks: Server, place: Path, *arguments: str, script: str = "predict", ranks: int = 1, status: int = 0) -> str:
    job = forks.start(*arguments, cwd=place, script=script, env=OFFLINE, ranks=ranks)
    assert checked(job.wait(240)) == status, job.text
    assert "Traceback" not in job.text
    return job.text


def of_mlflow(place: Path, query: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(place / "mlflow.db") as database:
        return list(database.execute(query))


def test_shards_that_begin_together_log_into_one_database_of_mlflow(place: Path, forks: Server) -> None:
    """Each a run of its own, in one experiment, although none finds the database there."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    jobs = [
        forks.start(*JOB, "logger=mlflow", "shard.count=3", f"shard.index={n}", cwd=place, env=OFFLINE)
        for n in range(3)
    ]
    for job in jobs:
        assert checked(job.wait(240)) == 0, job.text
        assert "nothing is logged" not in job.text
    found = of_mlflow(place, "SELECT name, status FROM runs ORDER BY name")
    assert found == [(f"out_{n}_of_3", "FINISHED") for n in range(3)]
    assert of_mlflow(place, "SELECT COUNT(*) FROM experiments WHERE name = 'voxquilt'") == [(1,)]


def test_a_database_that_cannot_be_opened_is_a_warning(place: Path, forks: Server) -> None:
    """As everything of loggers is."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    (place / "mlflow.db").write_bytes(b"something else" * 100)
    text = run(forks, place, *JOB, "logger=mlflow")
    assert "nothing is logged by logger.mlflow: " in text


def test_mlflow_keeps_numbers_pictures_settings_and_tables(place: Path, forks: Server) -> None:
    """In a local database; a run that goes on by its id keeps what it had, with a warning that settings differ."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run(forks, place, *JOB, "logger=mlflow")
    rows = read_rows([place / "out/manifest.csv"])
    found = of_mlflow(place, "SELECT step, value FROM metrics WHERE key = 'volume_ml/1' ORDER BY step")
    assert found == [(n, pytest.approx(rows[f"s{n}"].volume_ml, abs=1e-3)) for n in range(3)]
    assert of_mlflow(place, "SELECT value FROM metrics WHERE key = 'run/done'") == [(3.0,)]
    assert of_mlflow(place, "SELECT name, status FROM runs") == [("out", "FINISHED")]
    assert ("data.patch_size", "8") in of_mlflow(place, "SELECT key, value FROM params")
    (kept,) = place.rglob("artifacts/manifest.csv")
    assert kept.read_bytes() == (place / "out/manifest.csv").read_bytes()
    for n in range(3):
        (picture,) = kept.parent.glob(f"images/overlay?s{n}+step+{n}+*.png")
        with Image.open(picture) as shown, Image.open(place / f"out/s{n}_overlay.png") as written:
            assert np.array_equal(np.asarray(shown), np.asarray(written))
    ((run_id,),) = of_mlflow(place, "SELECT run_uuid FROM runs")
    text = run(forks, place, *JOB, "logger=mlflow", f"logger.mlflow.run_id={run_id}", "data.batch_size=2",
               "output_dir=again")  # fmt: skip
    assert text.count("MLFlowLogger has not all settings") == 1
    assert len(of_mlflow(place, "SELECT step FROM metrics WHERE key = 'volume_ml/1'")) == 6


def test_mlflow_takes_a_training_of_two_processes(place: Path, forks: Server) -> None:
    """Once, by rank 0."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run(forks, place, *TRAIN, "logger=[csv,mlflow]", script="train", ranks=2)
    assert len(of_mlflow(place, "SELECT value FROM metrics WHERE key = 'val_dice'")) == 1
    assert of_mlflow(place, "SELECT name, status FROM runs") == [("outputs", "FINISHED")]
    assert ("data.patch_size", "8") in of_mlflow(place, "SELECT key, value FROM params")
    assert len(list(place.rglob("images/validation?s0+*.png"))) == 1


def test_weights_and_biases_works_offline_and_keeps_jobs_apart(place: Path, forks: Server) -> None:
    """Two jobs of a sweep are two runs, each with its own numbers and pictures."""
    pytest.importorskip("wandb.sdk")
    sweep = ("-m", "stitch.overlap_mode=crop,hann", "logger=wandb", "logger.wandb.offline=true")
    run(forks, place, *JOB, *sweep)
    for mode in ("crop", "hann"):
        folder = place / f"out/stitch.overlap_mode-{mode}"
        (content,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        assert content.read_bytes().count(b"volume_ml/1") >= 3
        assert f'"{mode}"'.encode() in content.read_bytes()
        for n in range(3):
            (picture,) = folder.glob(f"wandb/offline-run-*/files/media/images/overlay/s{n}_*.png")
            with Image.open(picture) as shown, Image.open(folder / f"s{n}_overlay.png") as written:
                assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(written.convert("RGB")))


def test_optuna_finds_the_best_of_its_trials(place: Path, forks: Server) -> None:
    """Its value is the score of that trial's best.ckpt; the next command goes on with the study."""
    pytest.importorskip("optuna")
    options = ("-m", "hparams=optuna", "hydra.sweeper.n_trials=2", "logger=null", "output_dir=tuned",
               "hydra.sweeper.storage='sqlite:///optuna.db'")  # fmt: skip
    run(forks, place, *TRAIN, *options, script="train")
    scores = {}
    for path in place.glob("tuned/*/checkpoints/best.ckpt"):
        content = torch.load(path, weights_only=True)
        (state,) = [s for s in content["callbacks"].values() if isinstance(s, dict) and s.get("monitor") == "val_score"]
        scores[path.parts[-3]] = float(state["best_model_score"])
    assert len(scores) == 2
    found = yaml.safe_load((place / "tuned/optimization_results.yaml").read_text())
    assert found["best_value"] == pytest.approx(max(scores.values()))
    best = max(scores, key=lambda name: scores[name])
    assert best.startswith(f"model.optimizer.lr-{found['best_params']['model.optimizer.lr']}")
    run(forks, place, *TRAIN, *options, "run.objective=train_loss", "hydra.sweeper.n_trials=1", script="train")
    with sqlite3.connect(place / "optuna.db") as database:
        assert database.execute("SELECT COUNT(*) FROM trial_values").fetchone() == (3,)


def test_a_trial_that_fails_has_no_value(place: Path, forks: Server) -> None:
    """Its exit status is the sweep's, and is never taken for a score."""
    pytest.importorskip("optuna")
    text = run(forks, place, *TRAIN, "-m", "hparams=optuna", "hydra.sweeper.n_trials=1", "logger=null",
               "data.fold=7", script="train", status=2)  # fmt: skip
    assert "No trials are completed yet" in text
    text = run(forks, place, *TRAIN, "-m", "hparams=optuna", "logger=null", "data.folds=null",
               "hydra.sweeper.n_trials=1", script="train", status=2)  # fmt: skip
    assert "run.objective=best needs validation" in text


def test_a_search_goes_with_multirun(place: Path, forks: Server) -> None:
    """A single training would take the settings as they are."""
    pytest.importorskip("optuna")
    text = run(forks, place, *TRAIN, "hparams=optuna", script="train", status=2)
    assert "hparams=optuna tries several settings: it goes with --multirun, or -m." in text
