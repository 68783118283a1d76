"""Make the environments of peers that do not fit into voxquilt's: .bench/nnunet and .bench/konfai.

python benchmarks/environments.py nnunet konfai
"""

import argparse
import subprocess
import sys

from common import ENVIRONMENTS, ROOT, interpreter

REQUIREMENTS = ROOT / "benchmarks" / "environments"


def make(name: str) -> None:
    """A fresh virtual environment with voxquilt's torch and the pinned packages of `<name>.txt`."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENTS / name)], check=True)
    pip = [str(interpreter(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "torch"], check=True)
    # Without their dependencies: nnU-Net would bring a torchvision that wants another torch.
    subprocess.run([*pip, "--no-deps", "-r", str(REQUIREMENTS / f"{name}.txt")], check=True)


def main() -> None:
    """Make what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+", choices=sorted(file.stem for file in REQUIREMENTS.glob("*.txt")))
    for name in parser.parse_args().names:
        make(name)


if __name__ == "__main__":
    main()
