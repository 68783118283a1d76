"""Plans a run without predicting it: a table for people, and plan.json for programs."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from voxquilt.data.subject_size import SubjectCost, SubjectSize, run_size
from voxquilt.filesystem import write_json
from voxquilt.planning.planner import Forecast
from voxquilt.planning.preflight import check_models
from voxquilt.planning.resource_estimate import bytes_on_disk, estimate
from voxquilt.prediction.datamodule import GridDataModule, datamodule_of
from voxquilt.prediction.output_files import OutputOptions
from voxquilt.prediction.timing import Rates, measure
from voxquilt.reporting.manifest import of_shard
from voxquilt.reporting.progress import print_event
from voxquilt.text import byte_size, of_subjects, reason_of

# Rows of the table that is printed; plan.json has all.
_ROWS = 40


class DryRun(Callback):
    """Takes the writer's place: plans the run, prints the plan, and keeps the loop from predicting patches.

    Args:
        options: What the run would write.
        timed: Whether to predict a few patches as well, to estimate how long the run would take.
        as_json: Whether to print the plan as a line of JSON.
    """

    def __init__(self, options: OutputOptions, *, timed: bool, as_json: bool = False) -> None:
        self._options, self._timed, self._as_json = options, timed, as_json
        self._forecast: Forecast | None = None
        self._problems: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forecast what the run needs."""
        data = datamodule_of(trainer, "a plan")
        data.stop_when(lambda: True)  # nothing is loaded
        forecasts = check_models(trainer, pl_module, partial(self._options.settings, data), data, refuse=False)
        self._forecast = forecasts[0] if forecasts else None
        if len(data.models) > 1 and self._forecast is not None:
            self._forecast.notes.append(
                f"{len(data.models)} models predict each subject in turn; memory is that of the one that needs most."
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if wanted, and print the plan; the network is on its device now."""
        data = datamodule_of(trainer, "a plan")
        group, folder = data.plan.group, self._options.folder
        rates = None
        if self._timed and self._forecast is not None:
            group.first(lambda: folder.mkdir(parents=True, exist_ok=True))
            data.stop_when(bool)
            rates = self._measure(trainer, data)
        own = {
            "rank": group.rank, "subjects": len(data.plan.tasks), "load": round(data.plan.loads[group.rank], 1),
            "rates": rates, "room": self._forecast.machine if self._forecast else None,
            "memory": self._forecast.requirements.memory if self._forecast else 0,
            "problems": self._problems, "tasks": [[task.number, len(task.team) or 1] for task in data.plan.tasks],
        }  # fmt: skip
        ranks = group.gather(own)
        if group.rank == 0:
            group.first(lambda: self._write_plan(data, ranks))
        else:
            group.first(lambda: None)

    def _write_plan(self, data: GridDataModule, ranks: Sequence[dict[str, Any]]) -> None:
        content = _content(data, self._forecast, ranks)
        folder = self._options.folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / of_shard("plan.json", data.shard)
        if data.shard[1] > 1:  # plan_of_<n>.json holds what shards agreed on
            path = folder / f"dry_{path.name}"
        write_json(path, content)
        if self._as_json:
            print_event("plan", content)
        else:
            _print(content, self._forecast, path)

    def _measure(self, trainer: Trainer, data: GridDataModule) -> Rates | None:
        # The smallest subject of this process that can be predicted.
        sizes = {task.number: data.grids.cost(task.case).patches for task in data.plan.tasks[:50]}
        for task in sorted(data.plan.tasks[:50], key=lambda task: (sizes[task.number] < 2, sizes[task.number]))[:3]:
            size = data.grids.cost(task.case).size
            if size is None or task.problem:
                continue
            try:
                return measure(trainer, data, self._options, task, size.file)
            except Exception as error:  # as in a run, only this subject fails; other processes wait for this one
                self._problems.append(f"{task.case.subject} cannot be timed: {reason_of(error)}")
        return None


def _content(data: GridDataModule, forecast: Forecast | None, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    plan = data.plan
    rates = [rank["rates"] for rank in ranks if rank["rates"] is not None]
    pace = rates[0] if rates else None
    subjects = [
        _subject(name, cost, forecast, pace) for name, cost in zip(plan.subjects, plan.costs, strict=True)
    ]  # fmt: skip
    # As `assign_tasks` deals them: numbers count all subjects, including those that are done.
    numbers = sorted({number for rank in ranks for number, _ in rank["tasks"]})
    by_number = dict(zip(numbers, [cost.size for cost in plan.costs], strict=False))
    ranks_in_plan = []
    for rank in ranks:
        sizes = [_share(by_number[number], parts) for number, parts in rank["tasks"]]
        values = {key: rank[key] for key in ("rank", "subjects", "load", "memory")}
        rates_of_rank = rank["rates"] or pace
        seconds = rates_of_rank.total([size for size in sizes if size is not None]) if rates_of_rank else None
        ranks_in_plan.append(values | {"seconds": None if seconds is None else round(seconds, 2)})
    total: dict[str, Any] = {
        "subjects": len(subjects),
        "done_before": len(plan.done),
        "patches": plan.size.patches,
        "seconds": max((rank["seconds"] for rank in ranks_in_plan if rank["seconds"] is not None), default=None),
    }
    refusal = forecast.refusal if forecast else None
    known = forecast.as_json() if forecast else {"notes": ["there is nothing to predict, or no header can be read."]}
    known["notes"] = [*known["notes"], *(problem for rank in ranks for problem in rank["problems"])]
    return total | {
        "fits": refusal is None,
        "refusal": refusal or "",
        **known,
        "ranks": ranks_in_plan,
        "per_subject": subjects,
    }


def _share(size: SubjectSize | None, parts: int) -> SubjectSize | None:
    """The size of one of several parts of a subject."""
    return size if size is None or parts == 1 else size._replace(patches=-(-size.patches // parts))


def _subject(name: str, cost: SubjectCost, forecast: Forecast | None, pace: Rates | None) -> dict[str, Any]:
    size = cost.size
    if size is None or forecast is None:
        return {"subject": name, "problem": cost.problem or "there is no plan"}
    alone = estimate(run_size([size]), forecast.probe, forecast.outputs, forecast.settings)
    files, voxels, compress = forecast.outputs.files, size.voxels, forecast.settings.compress
    values = {
        "subject": name,
        "shape": list(size.native),
        "spacing": [round(mm, 4) for mm in size.spacing],
        "channels": size.channels,
        "model_shape": list(size.model),
        "patches": size.patches,
        "host": alone.memory,
        "device": sum(alone.device.values()),
        "output": bytes_on_disk(files, voxels, compress=compress),
        "output_at_most": bytes_on_disk(files, voxels, compress=False),
    }
    return values | ({"seconds": {k: round(v, 3) for k, v in pace.subject(size).items()}} if pace else {})


def _print(content: dict[str, Any], forecast: Forecast | None, path: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    _print_subjects(console, content["per_subject"], path)
    before = f", {content['done_before']} done before" if content["done_before"] else ""
    console.print(f"{of_subjects(content['subjects'])}{before}, {content['patches']} patches")
    if forecast is not None:
        _print_requirements(console, content, forecast)
    for rank in content["ranks"] if len(content["ranks"]) > 1 or content["seconds"] is not None else ():
        lasts = "" if rank["seconds"] is None else f", about {rank['seconds']:.1f} s once it has started"
        console.print(f"rank {rank['rank']}: {of_subjects(rank['subjects'])}, load {rank['load']:.0f}{lasts}")
    for note in content["notes"]:
        console.print(f"note: {escape(note)}")
    if content["refusal"]:
        console.print(f"[red]{escape(content['refusal'])}[/red]")
    console.print(f"see {escape(str(path))}")


def _print_subjects(console: Console, subjects: Sequence[dict[str, Any]], path: Path) -> None:
    timed = any("seconds" in subject for subject in subjects)
    gpu = any(subject.get("device") for subject in subjects)
    table = Table(title="plan")
    headings = ["shape", "mm", "model", "patches", "host", *["device"] * gpu, "output", *["seconds"] * timed]
    table.add_column("subject")
    for heading in headings:
        table.add_column(heading, justify="right")
    shown = subjects[:_ROWS]
    for subject in shown:
        name = escape(subject["subject"])
        if "problem" in subject:
            table.add_row(name, "will fail", style="red")
            continue
        cells = ["x".join(map(str, subject["shape"])), "x".join(f"{mm:.3g}" for mm in subject["spacing"])]
        cells += ["x".join(map(str, subject["model_shape"])), str(subject["patches"]), byte_size(subject["host"])]
        cells += [byte_size(subject["device"])] * gpu + [byte_size(subject["output"])]
        cells += [f"{sum(subject['seconds'].values()):.1f}"] if timed else []
        table.add_row(name, *cells)
    if subjects:
        console.print(table)
    for subject in shown:
        if "problem" in subject:
            console.print(f"[red]{escape(subject['subject'])}[/red]: {escape(subject['problem'])}")
    if len(subjects) > _ROWS:
        console.print(f"... and {len(subjects) - _ROWS} more, in {escape(str(path))}")


def _print_requirements(console: Console, content: dict[str, Any], forecast: Forecast) -> None:
    required, machine = forecast.requirements, forecast.machine
    parts = ", ".join(f"{use} {byte_size(size)}" for use, size in required.host.items() if size)
    available = byte_size(machine.memory)
    console.print(f"host memory of a process: {byte_size(required.memory)} ({parts}); available {available}")
    if required.device:
        parts = ", ".join(f"{use} {byte_size(size)}" for use, size in required.device.items())
        total = byte_size(sum(required.device.values()))
        sums, images = content["sums_on"], content["images_on"]
        console.print(f"device memory: {total} ({parts}); sums: {sums}; images: {images}")
    packed = f", at most {byte_size(required.bound)} (headers do not show how well voxels can be compressed)"
    console.print(
        f"outputs: about {byte_size(required.disk)}{packed * forecast.settings.compress}; "
        f"free {byte_size(machine.disk)}"
        + (f"; {byte_size(required.scratch)} for temporary files during the run" if required.scratch else "")
    )
    console.print(f"batches of {forecast.settings.batch_size} patches")
