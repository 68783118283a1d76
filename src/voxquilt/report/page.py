"""Renders report.html of one run, a page that needs no other file than the thumbnails beside it."""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from urllib.parse import quote

from voxquilt.filesystem import replacing
from voxquilt.report.changed_settings import changed_settings
from voxquilt.report.flags import LEAST, LIMIT, ClassCohort, Flag, cohorts_of, flags_of
from voxquilt.report.run_folder import METRICS, RunFolder, read_run
from voxquilt.report.strip_plot import HEIGHT, WIDTH, strip_plot
from voxquilt.reporting.manifest import Row
from voxquilt.text import digest, escaped

STATIC = ("report.css", "report.js")
"""The style and the script of the page."""
REPORT = "report.html"
"""The page's name in the output folder."""
THUMBNAILS = Path("report") / "thumbnails"
KINDS = {
    "overlay": "three planes with outlines",
    "image": "the output on three planes",
    "disagreement": "disagreement on three planes",
    "entropy": "entropy on three planes",
}
"""Kinds of thumbnails, in the order of the page, with what they show."""
_MOST_CLASSES = 6  # classes that have a column each
_MOST_PLOTS = 12  # that stand between the reader and the subjects; the others are folded up
_ROWS = 100  # of a part of the table, of which the browser lays out only those that are visible


@dataclass(frozen=True)
class SubjectView:
    """What the page shows of a subject: texts, and links relative to the page."""

    subject: str
    key: str
    status: str
    reason: str
    flags: list[Flag]
    thumbnails: list[tuple[str, str]]
    files: list[tuple[str, str]]
    viewer: str
    numbers: list[str]


def key_of(subject: str) -> str:
    """A subject's name in links and in names of files, whatever its id is."""
    return digest(escaped(subject), 16)


def link_to(path: str | Path) -> str:
    """A path below the page's folder as a link; bytes of a name that is not UTF-8 keep their values."""
    return quote(os.fsencode(path))


def write_report(folder: Path, viewer: Callable[[Row], str] | None = None) -> Path:
    """Write report.html from what is in an output folder.

    Args:
        folder: The output folder.
        viewer: The link to the viewer of a subject, or ''.

    Raises:
        InputError: the folder has no manifest.
        OutputError: the page cannot be written.
    """
    path = folder / REPORT
    page = render_report(read_run(folder), viewer)
    with replacing(path) as file:
        file.write(page)
    return path


def render_report(run: RunFolder, viewer: Callable[[Row], str] | None = None, *, served: bool = False) -> bytes:
    """The page of a run.

    Args:
        run: The run.
        viewer: See `write_report`.
        served: Whether the page is shown by the server, which has a viewer for every subject.
    """
    cohorts = cohorts_of(run)
    flags = flags_of(run, cohorts)
    ordered = in_order(run, flags)
    classes = [cohort for cohort in cohorts if cohort.name in run.class_names]
    shown = classes if 1 < len(classes) <= _MOST_CLASSES else []
    metrics = [metric for metric in METRICS if any(metric in means for means in run.metrics.values())]
    columns = ["volume [ml]"] if any(row.volume_ml is not None for row in run.rows.values()) else []
    columns += [f"{cohort.name} [ml]" for cohort in shown] + [METRICS[metric] for metric in metrics]
    columns += ["patches", "time [s]"]
    pictures = _pictures_in(run.path)
    subjects = [
        SubjectView(
            escaped(row.subject),
            key_of(row.subject),
            row.status,
            escaped(row.error),
            [Flag(flag.kind, escaped(flag.text)) for flag in flags.get(row.subject, ())],
            _thumbnails(row, pictures),
            [(escaped(_product_of(name, row)), link_to(name)) for name in row.outputs],
            viewer(row) if viewer is not None and row.status != "failed" else "",
            _numbers(row, run, shown, metrics, columns[0] == "volume [ml]"),
        )
        for row in ordered
    ]
    return render(
        "report.html.j2",
        None if served else STATIC,
        run=run,
        record=run.record,
        title=escaped(run.path.name),
        counts=_counts(run, flags),
        columns=columns,
        parts=[subjects[n : n + _ROWS] for n in range(0, len(subjects), _ROWS)],
        total=len(subjects),
        plots=[strip_plot(_printable(cohort)) for cohort in _outliers_first(cohorts)],
        most_plots=_MOST_PLOTS,
        plot_size=(WIDTH, HEIGHT),
        keys={escaped(subject): key_of(subject) for subject in run.rows},
        kinds=KINDS,
        scores=_class_scores(run, metrics),
        metrics=[METRICS[metric] for metric in metrics],
        settings=[(key, value_text(value), value_text(default)) for key, value, default in _changed(run)],
        limits=(LIMIT, LEAST),
        without_pictures=sum(not view.thumbnails and view.status != "failed" for view in subjects),
    )


def in_order(run: RunFolder, flags: Mapping[str, Sequence[Flag]]) -> list[Row]:
    """The subjects in the order of the page: failed ones, flagged ones, the most serious first, then the others."""
    return sorted(run.rows.values(), key=lambda row: _rank(row, flags.get(row.subject, ())))


def render(template: str, static: Sequence[str] | None, **values: Any) -> bytes:
    """A page that may load images beside it and nothing else.

    Args:
        template: Name of the template.
        static: Names of the style and the script in static/, which are put into the page; None for a page that a server
            gives out, with these beside it.
        values: What the template needs.
    """
    style, script = ("", "") if static is None else map(read_static, static)
    allowed = ("'self'", "'self'") if static is None else (_hash(style), _hash(script))
    policy = (
        f"default-src 'none'; img-src 'self' data: file:; style-src {allowed[0]}; script-src {allowed[1]}; "
        "base-uri 'none'; form-action 'none'"
    )
    page = _environment().get_template(template).render(style=style, script=script, policy=policy, **values)
    return page.encode("utf-8", "backslashreplace")


@cache
def _environment() -> Any:
    import jinja2  # here, so that the command answers a wrong folder at once

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )


def read_static(name: str) -> str:
    """A style or a script of a page."""
    return (Path(__file__).parent / "static" / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _rank(row: Row, flags: Sequence[Flag]) -> tuple[int, float, str]:
    if row.status == "failed":
        return 0, 0.0, row.subject
    return (1, -flags[0].weight, row.subject) if flags else (2, 0.0, row.subject)


def _counts(run: RunFolder, flags: Mapping[str, Sequence[Flag]]) -> list[tuple[str, int]]:
    statuses = [row.status for row in run.rows.values()]
    failed = statuses.count("failed")
    record = run.record
    counts = [("done", len(statuses) - failed), ("failed", failed), ("flagged", len(flags))]
    if statuses.count("skipped"):
        counts.append(("of them done before", statuses.count("skipped")))
    if len(run.records) == 1 and record.get("missing"):
        counts.append(("missing", int(record["missing"])))
    return counts


def _pictures_in(folder: Path) -> dict[str, set[str]]:
    """The names of the thumbnails of each kind."""
    found = {}
    for kind in KINDS:
        path = folder / THUMBNAILS / kind
        found[kind] = set(os.listdir(path)) if path.is_dir() else set()
    return found


def _product_of(name: str, row: Row) -> str:
    """What an output is, without the subject in its name and without its suffix."""
    return name.removeprefix(f"{row.subject}_").partition(".")[0]


def _thumbnails(row: Row, pictures: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    name = f"{row.subject}.jpg"
    if row.status == "failed":
        return []
    return [(kind, link_to(THUMBNAILS / kind / name)) for kind, names in pictures.items() if name in names]


def _numbers(
    row: Row, run: RunFolder, classes: Sequence[ClassCohort], metrics: Sequence[str], has_volumes: bool
) -> list[str]:
    means = run.metrics.get(row.subject, {})
    cells = [row.volume_ml] if has_volumes else []
    cells += [cohort.ml.get(row.subject) for cohort in classes] + [means.get(metric) for metric in metrics]
    texts = ["" if value is None else f"{value:.4g}" for value in cells]
    patches = f"{row.patches} of {row.patches + row.skipped}" if row.skipped else str(row.patches)
    return [*texts, "" if row.status == "failed" else patches, f"{row.seconds:.1f}"]


def _class_scores(run: RunFolder, metrics: Sequence[str]) -> list[tuple[str, int, list[str]]]:
    """A line for each class: its name, its subjects, and mean and standard deviation of each metric."""
    lines = []
    for name, by_metric in run.class_metrics.items():
        cells = []
        for metric in metrics:
            finite = [value for value in by_metric.get(metric, ()) if abs(value) != float("inf")]
            spread = f" ± {stdev(finite):.2g}" if len(finite) > 1 else ""
            cells.append(f"{fmean(finite):.3g}{spread}" if finite else "")
        lines.append((escaped(name), max(map(len, by_metric.values()), default=0), cells))
    return lines


def _outliers_first(cohorts: Sequence[ClassCohort]) -> Sequence[ClassCohort]:
    """The classes in their order, or if they are many, those with outliers before the others."""
    return cohorts if len(cohorts) <= _MOST_PLOTS else sorted(cohorts, key=lambda cohort: not cohort.outliers)


def _printable(cohort: ClassCohort) -> ClassCohort:
    ml = {escaped(subject): volume for subject, volume in cohort.ml.items()}
    scores = {escaped(subject): score for subject, score in cohort.scores.items()}
    return ClassCohort(escaped(cohort.name), ml, scores, cohort.note)


def _changed(run: RunFolder) -> list[tuple[str, Any, Any]]:
    return changed_settings(run.configuration) if run.configuration else []


def value_text(value: Any) -> str:
    """The value of a setting; nothing for null."""
    return "" if value is None else escaped(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
