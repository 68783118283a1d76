"""Makes reports from the command line: reads the arguments, and answers with a message and an exit status."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.text import escape_streams, of_subjects


def main(arguments: Sequence[str] | None = None) -> None:
    """`voxquilt-report` and `python -m voxquilt.report`: exits 0 once the page is written, else 2."""
    escape_streams()
    typed = _parser().parse_args(arguments)
    try:
        folders = [_checked(Path(folder).expanduser()) for folder in typed.folders]
        if len(folders) > 1:
            _compare(folders, typed)
        elif typed.serve:
            _serve(folders[0], typed)
        else:
            _report(folders[0], typed)
    except (VoxquiltError, OSError) as error:  # such as a folder that may not be written
        print(f"voxquilt: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="voxquilt-report",
        description="Writes report.html of a run of predict.py into its output folder; shows it with a viewer of "
        "volumes (--serve); or compares several runs of the same subjects.",
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        metavar="output_dir",
        help="the output folder of a run; several are compared with the first",
    )
    add("--serve", action="store_true", help="show the report, with a viewer of every subject's volumes, until Ctrl-C")
    add("--port", type=int, default=0, metavar="N", help="with --serve: the port (a free one)")
    add("--open", action="store_true", help="open the page in the browser")
    add("--embed", action="store_true", help="put small volumes beside the report, for a viewer without the server")
    add("-o", "--output", metavar="comparison.html", help="with several runs: the page that is written")
    return parser


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder} (relative to {Path.cwd()}).")
    return folder.resolve()


def _report(folder: Path, typed: argparse.Namespace) -> None:
    from voxquilt.report.missing_thumbnails import draw_missing  # imports torch
    from voxquilt.report.page import write_report
    from voxquilt.report.run_folder import read_run

    _refuse(typed, "--output", typed.output is not None, "several folders")
    run = read_run(folder)
    count = draw_missing(run, lambda text: print(f"no picture of {text}", file=sys.stderr))
    if count:
        print(f"drew the pictures of {of_subjects(count)}")
    viewer = None
    if typed.embed:
        from voxquilt.report.embedding import embed

        viewer = embed(run, print)
    path = write_report(folder, viewer)
    print(path)
    if typed.open:
        _open(path.as_uri())


def _serve(folder: Path, typed: argparse.Namespace) -> None:
    from voxquilt.report.server import ReportServer

    _refuse(typed, "--output", typed.output is not None, "several folders")
    _refuse(typed, "--embed", typed.embed, "a report on disk, without --serve")
    with ReportServer(folder, typed.port) as server:
        print(f"{server.url}\nCtrl-C ends it.", flush=True)
        if typed.open:
            _open(server.url)
        server.run()


def _compare(folders: Sequence[Path], typed: argparse.Namespace) -> None:
    from voxquilt.report.comparison import write_comparison

    _refuse(typed, "--serve", typed.serve, "one folder")
    _refuse(typed, "--embed", typed.embed, "one folder")
    path = Path(typed.output or "comparison.html").expanduser()
    write_comparison(folders, path)
    print(path.resolve())
    if typed.open:
        _open(path.resolve().as_uri())


def _refuse(typed: argparse.Namespace, option: str, given: bool, need: str) -> None:
    if given:
        raise ConfigError(f"{option} goes with {need}; {len(typed.folders)} given.")


def _open(url: str) -> None:
    import webbrowser

    webbrowser.open(url)
