"""Tests the report and its viewer in headless Chromium: a real run of six subjects, of which one fails."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import REQUIRED, Visit, chromium
from forks import Server
from PIL import Image
from run_folders import done, line, served, write_run
from synthetic import save

from voxquilt.report.command import main
from voxquilt.report.niivue import is_here
from voxquilt.report.page import key_of, write_report
from voxquilt.report.server import ReportServer

pytestmark = [pytest.mark.timeout(240), pytest.mark.processes]
SHAPE, AFFINE = (48, 48, 40), np.diag([2.0, 2, 2.5, 1])
RADII = {"a": 9.0, "b": 9.3, "c": 9.6, "d": 9.9, "huge": 17.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, forks: Server) -> Path:
    """Outputs of six subjects, one of them truncated and one with a label five times as large."""
    place = tmp_path_factory.mktemp("run")
    grid = np.indices(SHAPE).astype(float)
    distance = np.sqrt(((grid - np.array([24, 22, 20])[:, None, None, None]) ** 2).sum(0))
    for n, (name, radius) in enumerate(RADII.items()):
        image = 80 * (distance < radius) + 25 * (distance < 20) * (distance >= radius)
        image = image + np.random.default_rng(n).integers(0, 15, SHAPE)
        save(place / "in" / f"{name}.nii.gz", image.astype(np.int16), AFFINE)
    whole = (place / "in/a.nii.gz").read_bytes()
    (place / "in/broken.nii.gz").write_bytes(whole[:-2000])
    done = forks.run(
        "data.inputs=in", "output_dir=out", "ckpt_path=null", "model=state_dict", "model.net._target_=synthetic.Over50",
        "data.patch_size=32", "data.patch_overlap=8", "stitch.products=[labels,disagreement]", "trainer=cpu",
        "stitch.class_names=[background,ball]", "run.log=plain", cwd=place,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "report: " in done.stdout
    return place


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[ReportServer]:
    with served(place / "out") as server:
        yield server


@pytest.fixture
def report(place: Path, browser: Any) -> Iterator[Visit]:
    """The report as a double click opens it; afterwards nothing was complained of, and nothing asked for elsewhere."""
    with Visit(browser, f"file://{place}/out/") as visit:
        visit.page.goto((place / "out/report.html").as_uri())
        yield visit
        assert visit.complaints == []
        assert visit.foreign == []


def subjects(visit: Visit) -> list[str]:
    """The visible subjects in the order of the page."""
    rows = visit.page.locator("#table tbody tr:not([hidden])")
    return rows.evaluate_all("rows => rows.map((row) => row.cells[1].firstChild.textContent.trim())")


ALL = ["broken", "huge", "a", "b", "c", "d"]


def test_failures_come_first_then_outliers_with_reasons_and_pictures(report: Visit) -> None:
    """And every picture is one, loaded from the folder; the summary counts them."""
    page = report.page
    assert subjects(report) == ALL
    cells = page.locator("#table tbody tr td:nth-child(3)").all_text_contents()
    assert "truncated or damaged" in cells[0]
    assert "ball" in cells[1] or "all labels" in cells[1]
    assert "z = +" in cells[1]
    assert cells[2:] == [""] * 4
    assert page.locator(".tile").all_inner_texts()[:3] == ["done\n5", "failed\n1", "flagged\n1"]
    page.locator("#table tbody tr").last.scroll_into_view_if_needed()
    pictures = page.locator("#table img")
    assert pictures.count() == 10  # labels and disagreement of five subjects
    for n in range(10):
        pictures.nth(n).scroll_into_view_if_needed()
        pictures.nth(n).evaluate("image => image.decode()")
        assert pictures.nth(n).evaluate("image => image.naturalWidth") == 432
        assert pictures.nth(n).get_attribute("alt")


def test_search_and_filters_leave_what_they_name(report: Visit) -> None:
    """Words are searched in ids, reasons and flags; what is filtered out comes back."""
    page = report.page
    page.fill("#search", "TRUNC")
    assert subjects(report) == ["broken"]
    page.fill("#search", "z = huge")
    assert subjects(report) == ["huge"]
    page.fill("#search", "nowhere")
    assert subjects(report) == []
    assert page.locator("#count").inner_text() == "0 of 6"
    page.click("#reset")
    assert subjects(report) == ALL
    for value, wanted in (("failed", ALL[:1]), ("flagged", ALL[1:2]), ("rest", ALL[2:]), ("all", ALL)):
        page.check(f"input[value={value}]")
        assert subjects(report) == wanted
        assert page.locator("#count").inner_text() == f"{len(wanted)} of 6"


def test_columns_sort_both_ways_and_what_has_no_number_is_last(report: Visit) -> None:
    """By the heading's button, which says so to a screen reader."""
    page = report.page
    volume = page.get_by_role("button", name="volume [ml]")
    volume.click()
    assert subjects(report) == ["a", "b", "c", "d", "huge", "broken"]
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("volume")
    volume.click()
    assert subjects(report) == ["huge", "d", "c", "b", "a", "broken"]
    page.get_by_role("button", name="subject", exact=True).click()
    assert subjects(report) == ["a", "b", "broken", "c", "d", "huge"]
    page.get_by_role("button", name="what to look at").click()
    assert subjects(report) == ALL


def test_the_keyboard_does_all_of_it(report: Visit) -> None:
    """j and k move in what is visible, / searches, Escape shows all; every control is reached by Tab."""
    page = report.page
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.locator("tr.current th").inner_text().startswith("huge")
    assert page.evaluate("document.activeElement.tagName") == "TR"
    page.keyboard.press("k")
    assert page.locator("tr.current th").inner_text().startswith("broken")
    page.keyboard.press("/")
    page.keyboard.type("ball")
    page.keyboard.press("Escape")
    assert subjects(report) == ALL
    reached = set()
    page.locator("summary").first.focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.id || document.activeElement.textContent.trim().slice(0, 20)")
        )
    assert {"search", "volume [ml]", "subject", "what to look at"} <= reached


def test_an_outliers_dot_leads_to_its_row(report: Visit) -> None:
    """Even where the row is filtered out."""
    page = report.page
    page.check("input[value=failed]")
    dot = page.locator("figure a").first
    assert "z = +" in (dot.get_attribute("aria-label") or "")
    dot.focus()
    page.keyboard.press("Enter")
    page.locator("tr:target:not([hidden])").wait_for()
    assert subjects(report) == ALL
    assert page.locator("tr:target th").inner_text().startswith("huge")


@pytest.mark.parametrize("width", [400, 1280])
def test_every_column_can_be_seen(tmp_path: Path, browser: Any, width: int) -> None:
    """Parts of the table that the browser may leave out paint nothing beside their own box: no row sticks out of it."""
    names = [f"class {n}" for n in range(6)]
    lines = [line(subject, name, 1.0) for subject in "ab" for name in names]
    metrics = [
        {"subject": s, "label": 1, "dice": 0.9, "surface_dice": 0.8, "hd95_mm": 1.5} for s in "ab"
    ]  # fmt: skip
    folder = write_run(tmp_path, [done("a", 1.0), done("b", 2.0)], statistics=lines, metrics=metrics)
    page = write_report(folder)
    with Visit(browser, f"file://{tmp_path}/", size=(width, 700)) as visit:
        visit.page.goto(page.as_uri())
        assert visit.page.locator("#table thead th.number").count() == 12
        ends = visit.page.evaluate(
            "() => [...document.querySelectorAll('#table tbody tr')].map((row) => "
            "[row.lastElementChild, row.parentElement].map((one) => one.getBoundingClientRect().right))"
        )
        assert len(ends) == 2
        assert all(cell <= body for cell, body in ends)
        # The table is further down, and is not taken to have a hundred rows until it is seen.
        assert visit.page.evaluate("document.documentElement.scrollHeight") < 5000


CONTRAST = """
() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const part = (n) => (n <= 10 ? n / 3294 : ((n / 255 + 0.055) / 1.055) ** 2.4);
    const [x, y, z] = [r, g, b].map(part);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("script,style,option,title")) continue;
    if (!element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const colour = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(parse(colour)), light(behind(element))].sort((p, q) => q - p);
    found.push([(a + 0.05) / (b + 0.05), element.textContent.slice(0, 30)]);
  }
  return found.sort((p, q) => p[0] - q[0]);
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(place: Path, browser: Any, scheme: str) -> None:
    """WCAG's contrast of 4.5 for all text; the two schemes differ; the window may be narrow."""
    with Visit(browser, f"file://{place}/out/", scheme=scheme) as visit:
        visit.page.goto((place / "out/report.html").as_uri())
        for details in visit.page.locator("details").all():
            details.evaluate("element => { element.open = true; }")
        found = visit.page.evaluate(CONTRAST)
        assert len(found) > 50
        assert found[0][0] >= 4.5, found[:5]
        back = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(21, 22, 23)") == (scheme == "dark")
        visit.page.set_viewport_size({"width": 400, "height": 700})
        assert visit.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


# The viewer


def picture(visit: Visit) -> np.ndarray:
    """The pixels of the canvas."""
    visit.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return np.asarray(Image.open(io.BytesIO(visit.page.locator("#canvas").screenshot())).convert("RGB")).astype(int)


def open_viewer(visit: Visit, address: str) -> None:
    visit.page.goto(address)
    visit.wait()
    assert visit.page.locator("body[data-error]").count() == 0, visit.page.locator("#message").inner_text()
    visit.page.uncheck("#crosshair")
    # The ring of the focus would be in the picture; the colour of a class is then the only colour.
    visit.page.locator("#opacity").focus()


def opacity(visit: Visit, value: float) -> np.ndarray:
    visit.page.locator("#opacity").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", str(value)
    )
    return picture(visit)


needs_niivue = pytest.mark.skipif(
    not is_here() and not os.environ.get(REQUIRED), reason="NiiVue is not here: python -m voxquilt.report.niivue"
)


def check_overlay(visit: Visit) -> None:
    """The labels are seen exactly where they are: their colour at opacity 1, grey without them, between at 0.5."""
    without, half, full = (opacity(visit, value) for value in (0, 0.5, 1))
    is_grey = (without.max(-1) - without.min(-1)) <= 2
    assert is_grey.all()
    assert without.max() > 200
    coloured = (full == (230, 159, 0)).all(-1)
    changed = [(picture != without).any(-1) for picture in (half, full)]
    assert np.array_equal(*changed)
    assert np.array_equal(changed[1], coloured)
    # The ball of 17 voxels fills 2.5 times as much of a plane, in which the volume is as wide as 48, as one of 9.
    assert 0.05 < coloured.mean() < 0.5


@needs_niivue
def test_the_viewer_shows_the_volume_and_its_labels_and_moves_by_keys(server: ReportServer, browser: Any) -> None:
    """By way of the report's link; up and then down is where it was."""
    with Visit(browser, f"http://127.0.0.1:{server.port}/{server.token}/", size=(900, 640)) as visit:
        page = visit.page
        page.goto(server.url)
        assert page.evaluate("document.createElement('canvas').getContext('webgl2') !== null")
        page.get_by_role("link", name="huge", exact=True).click()
        visit.wait()
        open_viewer(visit, page.url)
        assert page.locator("h1").inner_text() == "huge"
        assert page.locator("#legend").inner_text() == "ball (1)"
        check_overlay(visit)
        before = picture(visit)
        place = page.locator("#place").inner_text()
        page.locator("#canvas").focus()
        page.keyboard.press("ArrowUp")
        page.locator("#opacity").focus()
        moved = picture(visit)
        assert (moved != before).any()
        assert page.locator("#place").inner_text() != place
        page.locator("#canvas").focus()
        page.keyboard.press("ArrowDown")
        page.locator("#opacity").focus()
        assert np.array_equal(picture(visit), before)
        assert visit.complaints == []
        assert visit.foreign == []


@needs_niivue
def test_the_crosshair_is_seen_wherever_it_is(server: ReportServer, browser: Any) -> None:
    """Also in a small window, where a line that is thinner than a pixel would be painted at some places only."""
    with Visit(browser, f"http://127.0.0.1:{server.port}/{server.token}/", size=(560, 420)) as visit:
        page = visit.page
        open_viewer(visit, f"{server.url.removesuffix('report.html')}report/viewer.html#{key_of('huge')}")
        for key in ("ArrowUp", "ArrowRight", "PageUp"):
            page.locator("#canvas").focus()
            page.keyboard.press(key)
            page.uncheck("#crosshair")
            without = picture(visit)
            page.check("#crosshair")
            changed = (picture(visit) != without).any(-1)
            # Two lines in each of three planes.
            assert changed.any(0).sum() > 100
            assert changed.any(1).sum() > 100


@needs_niivue
def test_maps_windows_and_neighbours(server: ReportServer, browser: Any) -> None:
    """The disagreement is seen when it is chosen; a window changes greys; n is the next subject of the report."""
    with Visit(browser, f"http://127.0.0.1:{server.port}/{server.token}/", size=(900, 640)) as visit:
        page = visit.page
        open_viewer(visit, f"{server.url.removesuffix('report.html')}report/viewer.html#{key_of('huge')}")
        plain = opacity(visit, 0)
        page.select_option("#map", label="disagreement")
        page.wait_for_selector("body:not([data-ready])", state="attached")
        visit.wait()
        assert (picture(visit) != plain).any()
        page.select_option("#map", label="none")
        visit.wait()
        page.fill("#high", "40")
        page.locator("#high").blur()
        assert picture(visit).mean() > plain.mean()
        page.locator("#canvas").focus()
        page.keyboard.press("n")
        page.get_by_role("heading", name="a", exact=True).wait_for()
        visit.wait()
        page.keyboard.press("Escape")
        page.wait_for_url(f"**/report.html#s-{key_of('a')}")
        assert visit.complaints == []
        assert visit.foreign == []


@needs_niivue
def test_small_volumes_are_in_the_viewer_without_a_server(place: Path, browser: Any) -> None:
    """After --embed, from files beside the report, by its link."""
    main(["--embed", str(place / "out")])
    with Visit(browser, f"file://{place}/out/", size=(900, 640)) as visit:
        page = visit.page
        page.goto((place / "out/report.html").as_uri())
        page.get_by_role("link", name="huge", exact=True).click()
        visit.wait()
        open_viewer(visit, page.url)
        check_overlay(visit)
        assert visit.complaints == []
        assert visit.foreign == []


def test_without_niivue_the_viewer_says_how_to_get_it(
    server: ReportServer, browser: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the report works."""
    monkeypatch.setattr("voxquilt.report.niivue.SCRIPT", tmp_path / "none.js")
    with Visit(browser, f"http://127.0.0.1:{server.port}/{server.token}/") as visit:
        visit.page.goto(f"{server.url.removesuffix('report.html')}report/viewer.html#{key_of('huge')}")
        visit.wait()
        assert "python -m voxquilt.report.niivue" in visit.page.locator("#message").inner_text()
