"""Plans a run without predicting it: a table for people, and plan.json for programs."""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from voxquilt.data.subject_size import SubjectCost, SubjectSize, extent
from voxquilt.filesystem import write_json
from voxquilt.planning.planner import Forecast
from voxquilt.planning.preflight import check_before_run
from voxquilt.planning.resource_estimate import needs, voxels_of
from voxquilt.prediction.datamodule import GridDataModule, datamodule_of
from voxquilt.prediction.output_files import OutputOptions
from voxquilt.prediction.timing import Rates, measure
from voxquilt.reporting.manifest import of_shard
from voxquilt.reporting.progress import print_event
from voxquilt.text import of_subjects, reason_of

# Rows of a table that a person reads; plan.json has all of them.
_ROWS = 40


class DryRun(Callback):
    """Takes the writer's place: plans the run, prints the plan, and has the loop find no patches.

    Args:
        options: What would have been written.
        timed: Also predict a few patches, to say how long the run would take.
        as_json: Print the plan as a line of JSON.
    """

    def __init__(self, options: OutputOptions, *, timed: bool, as_json: bool = False) -> None:
        self._options, self._timed, self._as_json = options, timed, as_json
        self._planned: Forecast | None = None
        self._problems: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan."""
        data = datamodule_of(trainer, "a plan")
        data.stop_when(lambda: True)  # nothing is loaded
        settings = self._options.settings(data, pl_module, trainer)
        data.batch_size, self._planned = check_before_run(trainer, pl_module, settings, data, refuse=False)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, where that is asked for, and say it all; the network is on its device now."""
        data = datamodule_of(trainer, "a plan")
        group, folder = data.plan.group, self._options.folder
        rates = None
        if self._timed and self._planned is not None:
            group.first(lambda: folder.mkdir(parents=True, exist_ok=True))
            data.stop_when(bool)
            rates = self._measured(trainer, data)
        mine = {
            "rank": group.rank, "subjects": len(data.plan.tasks), "load": round(data.plan.loads[group.rank], 1),
            "rates": rates, "room": self._planned.room if self._planned else None,
            "memory": self._planned.needs.memory if self._planned else 0,
            "problems": self._problems, "tasks": [[task.number, len(task.team) or 1] for task in data.plan.tasks],
        }  # fmt: skip
        ranks = group.gather(mine)
        if group.rank == 0:
            group.first(lambda: self._say(data, ranks))
        else:
            group.first(lambda: None)

    def _say(self, data: GridDataModule, ranks: Sequence[dict[str, Any]]) -> None:
        content = _content(data, self._planned, ranks)
        folder = self._options.folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / of_shard("plan.json", data.shard)
        if data.shard[1] > 1:  # plan_of_<n>.json is what shards agreed on
            path = folder / f"dry_{path.name}"
        write_json(path, content)
        if self._as_json:
            print_event("plan", content)
        else:
            _print(content, self._planned, path)

    def _measured(self, trainer: Trainer, data: GridDataModule) -> Rates | None:
        # The smallest subject of this process that can be predicted.
        sizes = {task.number: data.grids.cost(task.case).patches for task in data.plan.tasks[:50]}
        for task in sorted(data.plan.tasks[:50], key=lambda task: (sizes[task.number] < 2, sizes[task.number]))[:3]:
            of = data.grids.cost(task.case).outline
            if of is None or task.problem:
                continue
            try:
                return measure(trainer, data, self._options, task, of.file)
            except Exception as error:  # as in a run, it costs this subject; other processes wait for a word
                self._problems.append(f"{task.case.subject} cannot be timed: {reason_of(error)}")
        return None


def _content(data: GridDataModule, planned: Forecast | None, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    plan = data.plan
    outlines = [size.outline for size in plan.sizes]
    rates = [rank["rates"] for rank in ranks if rank["rates"] is not None]
    pace = rates[0] if rates else None
    subjects = [
        _subject(name, size, planned, pace) for name, size in zip(plan.everything, plan.sizes, strict=True)
    ]  # fmt: skip
    # As `distributed` deals them: numbers are those of all subjects, done ones included.
    numbers = sorted({number for rank in ranks for number, _ in rank["tasks"]})
    by_number = dict(zip(numbers, outlines, strict=False))
    told = []
    for rank in ranks:
        mine = [_share(by_number[number], parts) for number, parts in rank["tasks"]]
        of_rank = {key: rank[key] for key in ("rank", "subjects", "load", "memory")}
        own = rank["rates"] or pace
        seconds = own.total([one for one in mine if one is not None]) if own else None
        told.append(of_rank | {"seconds": None if seconds is None else round(seconds, 2)})
    total: dict[str, Any] = {
        "subjects": len(subjects),
        "done_before": len(plan.done),
        "patches": plan.extent.patches,
        "seconds": max((one["seconds"] for one in told if one["seconds"] is not None), default=None),
    }
    refusal = planned.refusal if planned else None
    known = planned.as_json() if planned else {"notes": ["there is nothing to predict, or no header can be read."]}
    known["notes"] = [*known["notes"], *(problem for rank in ranks for problem in rank["problems"])]
    return total | {
        "fits": refusal is None,
        "refusal": refusal or "",
        **known,
        "ranks": told,
        "per_subject": subjects,
    }


def _share(one: SubjectSize | None, parts: int) -> SubjectSize | None:
    return one if one is None or parts == 1 else one._replace(patches=-(-one.patches // parts))


def _subject(name: str, size: SubjectCost, planned: Forecast | None, pace: Rates | None) -> dict[str, Any]:
    one = size.outline
    if one is None or planned is None:
        return {"subject": name, "problem": size.problem or "there is no plan"}
    alone = needs(extent([one]), planned.probe, planned.forms, planned.settings)
    voxels, compress = prod(one.native), planned.settings.compress
    found = {
        "subject": name,
        "shape": list(one.native),
        "spacing": [round(mm, 4) for mm in one.spacing],
        "channels": one.channels,
        "model_shape": list(one.model),
        "patches": one.patches,
        "host": alone.memory,
        "device": sum(alone.device.values()),
        "output": voxels_of(planned.forms.made, voxels, compress=compress),
        "output_at_most": voxels_of(planned.forms.made, voxels, compress=False),
    }
    return found | ({"seconds": {k: round(v, 3) for k, v in pace.subject(one).items()}} if pace else {})


def _print(content: dict[str, Any], planned: Forecast | None, path: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    subjects = content["per_subject"]
    timed = any("seconds" in one for one in subjects)
    gpu = any(one.get("device") for one in subjects)
    table = Table(title="plan")
    headings = ["shape", "mm", "model", "patches", "host", *["device"] * gpu, "output", *["seconds"] * timed]
    table.add_column("subject")
    for heading in headings:
        table.add_column(heading, justify="right")
    for one in subjects[:_ROWS]:
        if "problem" in one:
            table.add_row(escape(one["subject"]), "will fail", style="red")
            continue
        cells = ["x".join(map(str, one["shape"])), "x".join(f"{mm:.3g}" for mm in one["spacing"]),
                 "x".join(map(str, one["model_shape"])), str(one["patches"]), _size(one["host"])]  # fmt: skip
        cells += [_size(one["device"])] * gpu + [_size(one["output"])]
        cells += [f"{sum(one['seconds'].values()):.1f}"] if timed else []
        table.add_row(escape(one["subject"]), *cells)
    if subjects:
        console.print(table)
    for one in [one for one in subjects[:_ROWS] if "problem" in one]:
        console.print(f"[red]{escape(one['subject'])}[/red]: {escape(one['problem'])}")
    if len(subjects) > _ROWS:
        console.print(f"... and {len(subjects) - _ROWS} more, in {escape(str(path))}")
    before = f", {content['done_before']} done before" if content["done_before"] else ""
    console.print(f"{of_subjects(content['subjects'])}{before}, {content['patches']} patches")
    if planned is not None:
        _print_needs(console, content, planned)
    for one in content["ranks"] if len(content["ranks"]) > 1 or content["seconds"] is not None else ():
        lasts = "" if one["seconds"] is None else f", about {one['seconds']:.1f} s once it has started"
        console.print(f"rank {one['rank']}: {of_subjects(one['subjects'])}, load {one['load']:.0f}{lasts}")
    for note in content["notes"]:
        console.print(f"note: {escape(note)}")
    if content["refusal"]:
        console.print(f"[red]{escape(content['refusal'])}[/red]")
    console.print(f"see {escape(str(path))}")


def _print_needs(console: Console, content: dict[str, Any], planned: Forecast) -> None:
    required, room = planned.needs, planned.room
    parts = ", ".join(f"{what} {_size(size)}" for what, size in required.host.items() if size)
    console.print(f"host memory of a process: {_size(required.memory)} ({parts}); available {_size(room.memory)}")
    if required.device:
        parts = ", ".join(f"{what} {_size(size)}" for what, size in required.device.items())
        console.print(f"device memory: {_size(sum(required.device.values()))} ({parts}); sums: {content['sums_on']}")
    packed = f", at most {_size(required.bound)} (how far voxels can be packed, headers do not say)"
    console.print(
        f"outputs: about {_size(required.disk)}{packed * planned.settings.compress}; free {_size(room.disk)}"
        + (f"; {_size(required.scratch)} beside while the run goes on" if required.scratch else "")
    )
    console.print(f"batches of {planned.settings.batch_size} patches")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
