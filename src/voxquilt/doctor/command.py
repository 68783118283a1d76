"""The command `voxquilt doctor`: says what would break on this machine, and what to put into a report of a bug."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict

from voxquilt.distributed.signals import ended_at_once
from voxquilt.text import escape_streams

# Topics are as wide as the longest.
_WIDTH = 22


def main(arguments: Sequence[str] | None = None) -> None:
    """`voxquilt doctor` and `python -m voxquilt doctor`: exits 0, or 1 if there is a problem."""
    escape_streams()
    typed = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that are imported; what matters has a line
        with ended_at_once():
            from voxquilt.doctor.examination import examine  # imports torch

        lines = examine()
    problems = sum(line.state == "problem" for line in lines)
    if typed.json:
        print(json.dumps({"ok": not problems, "lines": [asdict(line) for line in lines]}, indent=2))
    else:
        for line in lines:
            print(f"{line.state:<8} {line.topic:<{_WIDTH}} {line.text}")
            if line.advice:
                print(f"{'':<9}{'':<{_WIDTH}} -> {line.advice}")
        print(f"{problems} problem{'s' * (problems != 1)}" if problems else "no problems")
    sys.exit(1 if problems else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="voxquilt", description="Commands beside voxquilt-train, voxquilt-predict and voxquilt-export."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor", help="what would break on this machine",
        description="Says which versions, devices and limits there are, whether kernels compile and processes meet, "
        "and what to do about what is wrong. Names of users, machines and folders are left out: paste it into a "
        "report of a bug. Exit status 1 if there is a problem.",
    )  # fmt: skip
    doctor.add_argument("--json", action="store_true", help="a JSON object in place of lines")
    return parser
