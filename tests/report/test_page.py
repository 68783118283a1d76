"""Tests report.html: its order, its links, its size, and that no name or message becomes markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import ball, done, line, write_run

from voxquilt.errors import InputError
from voxquilt.filesystem import conf_dir
from voxquilt.report.changed_settings import changed_settings, defaults, differing_settings
from voxquilt.report.comparison import write_comparison
from voxquilt.report.flags import ClassCohort
from voxquilt.report.missing_thumbnails import draw_missing
from voxquilt.report.page import write_report
from voxquilt.report.run_folder import ClassVolume, read_run
from voxquilt.report.strip_plot import WIDTH, strip_plot
from voxquilt.reporting.manifest import Row


class Page(HTMLParser):
    """The rows, links, pictures and element names of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.folded = False
        self.text = path.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        if tag == "tr" and "data-is" in given:
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        self.folded |= tag == "p"
        if tag == "a":
            self.links.append(given["href"] or "")
        if tag == "img":
            self.pictures.append(given)

    def handle_endtag(self, tag: str) -> None:
        self.folded &= tag != "p"

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and not self.folded:
            self.rows[-1][-1] += data

    @property
    def subjects(self) -> list[str]:
        return [row[1].strip() for row in self.rows]


def report(folder: Path, rows: list[Row], **more: Any) -> Page:
    return Page(write_report(write_run(folder, rows, **more)))


def test_failed_subjects_come_first_then_flagged_ones_then_the_others(tmp_path: Path) -> None:
    """Each in an order of its own; reasons and flags are in the row."""
    ml = {f"s{n}": 100.0 + n for n in range(10)} | {"s4": 300.0, "s7": 900.0}
    rows = [done(subject, volume) for subject, volume in ml.items()]
    rows += [Row("z", "failed", error="it is truncated"), Row("y", "failed", error="no file")]
    page = report(tmp_path, rows)
    assert page.subjects == ["y", "z", "s7", "s4", "s0", "s1", "s2", "s3", "s5", "s6", "s8", "s9"]
    assert "it is truncated" in page.rows[1][2]
    assert "900 ml, z = +" in page.rows[2][2]


ODD = [
    "<script>alert(1)<|script>", 'a"b', "a'b", "a&lt b", "{{ 7 * 7 }}", "{% endraw %}", "ä ö#?%41", "x\udcff", "-",
]  # fmt: skip


def test_names_and_messages_never_become_markup(tmp_path: Path) -> None:
    """Of subjects, classes, settings and errors."""
    rows = [done(name, 10.0 + n) for n, name in enumerate(ODD)]
    rows.append(Row("failed", "failed", error="<img src=x onerror=alert(1)> </script><b>"))
    statistics = [line(row.subject, "<i>class</i>", 1.0) for row in rows[:6]]
    record = {
        "configuration": {"mine": {"<u>": "</code><script>"}},
        "host": "<s>",
        "reason": "<em>",
        "status": "stopped",
    }
    page = report(tmp_path, rows, statistics=statistics, record=record)
    assert not {"i", "u", "s", "em"} & {*page.tags}
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert "49" not in page.subjects
    assert {"x\\udcff", "{{ 7 * 7 }}", 'a"b', "a&lt b"} <= {*page.subjects}


def test_links_lead_to_files_whatever_they_are_called(tmp_path: Path) -> None:
    """Also to one whose name is not UTF-8, and no link leaves the folder."""
    rows = [ball(tmp_path, name, 5) for name in ODD]
    write_run(tmp_path / "out", rows)
    assert draw_missing(read_run(tmp_path / "out"), lambda _: None) == len(ODD)
    page = Page(write_report(tmp_path / "out"))
    linked = [link for link in page.links if not link.startswith("#")] + [str(p["src"]) for p in page.pictures]
    assert len(linked) == 2 * len(ODD)
    for link in linked:
        assert Path(tmp_path / "out" / Path(unquote_to_bytes(link).decode("utf-8", "surrogateescape"))).is_file(), link
    assert all(picture["alt"] and picture["loading"] == "lazy" and picture["width"] for picture in page.pictures)


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    """No address in it but links below the folder; a policy that allows its own style and script only."""
    page = report(tmp_path, [done("a", 1.0)])
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.text)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1]
    assert policy[1].count("sha256-") == 2
    assert "unsafe" not in policy[1]
    assert not re.search(r"<[^>]* (style|on\w+)=", page.text)


def test_classes_have_columns_and_metrics_have_means(tmp_path: Path) -> None:
    """Up to six classes; metrics of the first labels, without those of stitch.compare."""
    rows = [done("a", 3.0), done("b", 7.0), done("c", 0.0)]
    statistics = [line(s, n, ml) for s, n, ml in (("a", "x", 1.0), ("a", "y", 2.0), ("b", "x", 3.0), ("b", "y", 4.0))]
    statistics += [line("a", "x", 99.0, output="labels_crop")]
    metrics: list[dict[str, Any]] = [
        {"subject": "a", "class": "x", "product": "labels", "dice": 0.5, "hd95_mm": "inf", "error": ""},
        {"subject": "a", "class": "y", "product": "labels", "dice": 1, "hd95_mm": 2, "error": ""},
        {"subject": "a", "class": "x", "product": "labels_crop", "dice": 0, "hd95_mm": 2, "error": ""},
        {"subject": "b", "class": "", "product": "", "dice": "", "hd95_mm": "", "error": "there is no label"},
    ]
    page = report(tmp_path, rows, statistics=statistics, metrics=metrics)
    heads = re.findall(r'class="number"><button type="button">([^<]*)<', page.text)
    assert heads == ["volume [ml]", "x [ml]", "y [ml]", "Dice", "HD95 [mm]", "patches", "time [s]"]
    cells = {row[1].strip(): row[3:] for row in page.rows}
    assert [cell.strip() for cell in cells["a"]] == ["3", "1", "2", "0.75", "inf", "4", "1.5"]
    assert [cell.strip() for cell in cells["b"]][:5] == ["7", "3", "4", "", ""]
    run = read_run(tmp_path)
    assert run.not_compared == {"b": "there is no label"}


def test_a_series_of_volumes_has_its_mean(tmp_path: Path) -> None:
    """As in the manifest; it touches the border where one of them does."""
    lines = [line("a", "x", ml, touches=ml > 3) for ml in (1.0, 2.0, 6.0)]
    write_run(tmp_path, [done("a", 3.0)], statistics=lines)
    assert read_run(tmp_path).volumes == {"a": [ClassVolume("x", 3.0, True)]}


def test_without_statistics_the_page_says_so(tmp_path: Path) -> None:
    """And shows what the manifest has."""
    assert "There is no statistics.csv here" in report(tmp_path / "a", [done("a", 1.0)]).text
    assert (
        "There is no statistics.csv"
        not in report(tmp_path / "b", [done("a", 1.0)], statistics=[line("a", "x", 1)]).text
    )


def test_a_folder_without_a_manifest_is_no_run(tmp_path: Path) -> None:
    """It is refused, and nothing is written."""
    with pytest.raises(InputError, match=r"has no manifest\.csv"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_records_that_are_missing_or_damaged_cost_what_they_say(tmp_path: Path) -> None:
    """A report of the manifest alone is a report."""
    write_run(tmp_path, [done("a", 1.0)])
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "statistics.csv").write_bytes(b"subject,ml\na,\xff\n")
    (tmp_path / "metrics.csv").write_text("")
    assert Page(write_report(tmp_path)).subjects == ["a"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
ENTRIES = (
    "status", "reason", "began", "ended", "host", "processes", "missing", "seconds", "patches_per_second",
    "voxels_per_second", "configuration", "versions", "other",
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=st.dictionaries(st.sampled_from(ENTRIES), VALUES) | VALUES)
def test_a_record_may_hold_anything(tmp_path: Path, record: object) -> None:
    """Such as one that was edited by hand: entries of other types are as if they were missing, also side by side."""
    write_run(tmp_path / "a", [done("a", 1.0)])
    write_run(tmp_path / "b", [done("a", 1.0)])
    (tmp_path / "b/run.json").write_text(json.dumps(record))
    assert Page(write_report(tmp_path / "b")).subjects == ["a"]
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "comparison.html")


@pytest.mark.parametrize("name", ["statistics.csv", "metrics.csv", "run.json", "manifest_1_of_2.csv"])
def test_a_folder_in_the_place_of_a_record_costs_what_the_record_says(tmp_path: Path, name: str) -> None:
    """As a file that is missing."""
    folder = write_run(tmp_path / "out", [done("a", 1.0)])
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    assert Page(write_report(folder)).subjects == ["a"]


def test_many_classes_do_not_push_the_subjects_away(tmp_path: Path) -> None:
    """All have a plot, but twelve of them come before the table, those with outliers first."""
    subjects = [f"s{n}" for n in range(6)]
    lines = [line(s, f"c{n}", 1 + 0.01 * m) for m, s in enumerate(subjects) for n in range(30)]
    lines[-1]["ml"] = 90.0  # of the last class
    rows = [done(name, 1 + 0.1 * n) for n, name in enumerate(subjects)]
    text = Page(write_report(write_run(tmp_path / "out", rows, statistics=lines))).text
    before, _, folded = text.partition("<summary>19 more</summary>")
    assert before.count("<figcaption>") == 12
    assert re.findall(r"<figcaption>(\w+)", before)[0] == "c29"
    assert folded.count("<figcaption>") == 19


def test_rows_of_all_shards_are_on_the_page(tmp_path: Path) -> None:
    """The latest row of a subject counts, as everywhere."""
    write_run(tmp_path, [done("a", 1.0)])
    (tmp_path / "manifest.csv").rename(tmp_path / "manifest_0_of_2.csv")
    write_run(tmp_path, [done("b", 1.0)])
    (tmp_path / "manifest.csv").rename(tmp_path / "manifest_1_of_2.csv")
    assert Page(write_report(tmp_path)).subjects == ["a", "b"]


@given(st.lists(st.floats(0, 1e9, allow_subnormal=False), min_size=2, max_size=60))
def test_a_plot_holds_every_dot_within_its_axis(volumes: list[float]) -> None:
    """In order along the axis, whose ticks cover all volumes; the path of dots has a bounded length."""
    plot = strip_plot(ClassCohort("x", {str(n): ml for n, ml in enumerate(volumes)}))
    places = [float(x) for x in re.findall(r"M([\d.]+),", plot.path)]
    assert all(0 <= x <= WIDTH for x in [*places, plot.middle, *(x for x, _ in plot.ticks)])
    assert 2 <= len(plot.ticks) <= 9
    labels = [float(text) for _, text in plot.ticks]
    assert labels == sorted(labels)
    assert labels[0] <= min(volumes) * 1.001
    assert labels[-1] >= max(volumes) * 0.999
    assert len(places) <= len(volumes)


def test_a_plot_of_many_subjects_is_as_small_as_one_of_some() -> None:
    """Dots that would cover each other are drawn once."""
    plot = strip_plot(ClassCohort("x", {str(n): float(n % 1000) for n in range(200_000)}))
    assert len(plot.path) < 60_000


def test_defaults_are_those_of_conf(tmp_path: Path) -> None:
    """Read from the files that Hydra composes; a run with only them changes nothing but what has no default."""
    usual = defaults()
    assert usual["stitch.overlap_mode"] == "gaussian"
    assert usual["trainer.devices"] == 1
    assert usual["callbacks.writer.report"] is True
    stitch = yaml.safe_load((conf_dir() / "stitch/default.yaml").read_text())
    data = yaml.safe_load((conf_dir() / "data/default.yaml").read_text())
    plain = {
        "stitch": stitch | {"activation": None},
        "data": data | {"inputs": "in", "patch_size": 32, "batch_size": 4},
    }
    assert changed_settings(plain) == [
        ("data.inputs", "in", None),
        ("data.patch_size", 32, None),
        ("data.batch_size", 4, 1),
    ]


def test_settings_that_differ_between_runs_are_found_wherever_they_are() -> None:
    """Also those that only one run has; the folder is none."""
    first = {"data": {"step": 1, "skip": None}, "output_dir": "a"}
    other = {"data": {"step": 2, "skip": None}, "stitch": {"order": 3}, "output_dir": "b"}
    assert differing_settings([first, other]) == [("data.step", [1, 2]), ("stitch.order", [None, 3])]
