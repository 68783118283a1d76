"""How large and how quick is the report of many subjects? For docs/benchmarks.md.

python benchmarks/report.py [--subjects 500,5000]

Synthetic subjects with four classes, thumbnails and disagreement. Times in the browser are of headless Chromium, with
software rendering, from the request of the page; filtering and sorting are until the next frame is painted.
"""

import argparse
import csv
import gzip
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

from voxquilt.reporting.manifest import Manifest, Row
from voxquilt.reporting.thumbnails import path_of, write_thumbnails

CLASSES = ("liver", "spleen", "left kidney", "right kidney")
# Twice, since the first frame after a change may come before its layout.
_PAINTS = "performance.getEntriesByName('first-contentful-paint')"
_FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
_SEARCH = "const field = document.getElementById('search'); field.value = '{}'; field.dispatchEvent(new Event('input'))"
ACTIONS = {
    "filter_ms": "document.querySelector('input[value=flagged]').click()",
    "all_ms": "document.querySelector('input[value=all]').click()",
    "search_ms": _SEARCH.format("sub-0100"),
    "clear_ms": _SEARCH.format(""),
    "sort_ms": "document.querySelectorAll('thead button')[2].click()",
}


def make_folder(folder: Path, subjects: int) -> None:
    """An output folder as a run of so many subjects leaves it, without its volumes."""
    generator = np.random.default_rng(0)
    rows, lines = [], []
    grid = np.indices((40, 40, 40)).astype(float) - 20
    image = (np.sqrt((grid**2).sum(0)) < 18) * 100 + generator.integers(0, 40, (40, 40, 40))
    labels = (np.sqrt((grid**2).sum(0)) < 9).astype(np.uint8)[None]
    write_thumbnails(folder, "first", image, labels, {"disagreement": generator.random((40, 40, 40))}, np.eye(4))
    pictures = {kind: path_of(folder, kind, "first") for kind in ("overlay", "disagreement")}
    for n in range(subjects):
        subject = f"sub-{n:05d}"
        if n % 250 == 17:
            rows.append(Row(subject, "failed", error=f"in/{subject}.nii.gz: reading its voxels failed (truncated)."))
            continue
        volumes = generator.normal(1, 0.08, 4) * [1500, 200, 160, 150]
        if n % 400 == 3:
            volumes[1] *= 3
        outputs = (f"{subject}_labels.nii.gz", f"{subject}_disagreement.nii.gz")
        inputs = {"image": f"/data/cohort/{subject}/{subject}_ct.nii.gz"}
        rows.append(
            Row(subject, "done", outputs, 48, 9.3, volume_ml=volumes.sum(), kinds=("labels", "map"), inputs=inputs)
        )
        lines += [
            (subject, "labels", c, name, ml, 0) for c, (name, ml) in enumerate(zip(CLASSES, volumes, strict=True))
        ]
        for kind, picture in pictures.items():
            shutil.copyfile(picture, path_of(folder, kind, subject))
    Manifest(folder / "manifest.csv", rows).close()
    with open(folder / "statistics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "output", "label", "name", "ml", "touches_border"])
        writer.writerows(lines)
    (folder / "run.json").write_text(json.dumps({"status": "finished", "seconds": 46500.0, "configuration": {}}))


def measure(folder: Path) -> dict[str, float]:
    """Seconds and peak memory of the command, the page's size, and times in the browser."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "voxquilt.report", str(folder)], check=True, stdout=subprocess.DEVNULL)
    found = {"command_s": time.perf_counter() - began}
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    page = (folder / "report.html").read_bytes()
    found |= {"page_mb": len(page) / 1e6, "packed_mb": len(gzip.compress(page)) / 1e6}
    return found | in_browser(folder / "report.html")


def in_browser(path: Path) -> dict[str, float]:
    """Times of the page in Chromium, in ms: medians of five."""
    flags = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    runs: list[dict[str, float]] = []
    with sync_playwright() as driver:
        for _ in range(5):
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            pictures: list[str] = []
            page.on("request", lambda request, found=pictures: found.append(request.url))
            page.goto("data:text/html,<p>a browser that runs already")
            page.goto(path.as_uri())
            while not page.evaluate(f"{_PAINTS}.length"):  # the page's policy lets no function wait for it
                page.wait_for_timeout(20)
            times = {"paint_ms": page.evaluate(f"{_PAINTS}[0].startTime")}
            page.mouse.wheel(0, 4000)  # past the subjects that failed, which have no picture
            page.wait_for_timeout(2000)
            times["pictures"] = sum(url.endswith(".jpg") for url in pictures)
            for name, action in ACTIONS.items():
                timed = (
                    f"const began = performance.now(); {action}; await ({_FRAMES})(); return performance.now() - began;"
                )
                times[name] = page.evaluate(f"async () => {{ {timed} }}")
            runs.append(times)
            browser.close()
    return {name: float(np.median([run[name] for run in runs])) for name in runs[0]}


def main() -> None:
    """Print a row for each number of subjects."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--subjects", default="500,5000")
    for count in map(int, parser.parse_args().subjects.split(",")):
        with tempfile.TemporaryDirectory() as name:
            make_folder(Path(name), count)
            found = measure(Path(name))
            print(count, {key: round(value, 2) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
