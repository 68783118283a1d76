"""Fetches NiiVue, the viewer's one script, from npm's registry, and checks it; imports only the standard library.

The script is not in the repository. The build of a wheel puts it in, `make` fetches it in a checkout, and so does
`python -m voxquilt.report.niivue`. The registry is that of npm's own settings if npm is installed, else that of the
environment's npm_config_registry, else npm's public one.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

VERSION = "0.69.0"
SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
SCRIPT = Path(__file__).parent / "vendor" / "niivue.umd.js"
HOW = "python -m voxquilt.report.niivue fetches it"
_MEMBER = "package/dist/niivue.umd.js"
_TIMEOUT = 300.0  # seconds


def is_here() -> bool:
    """Whether the script is there, with its checksum."""
    return SCRIPT.is_file() and _is_good(SCRIPT.read_bytes())


def fetch() -> None:
    """Fetch the script, unless it is here.

    Raises:
        OSError: the registry cannot be reached, or what came is something else.
    """
    if is_here():
        return
    with tarfile.open(fileobj=io.BytesIO(_packed()), mode="r:gz") as package:
        member = package.extractfile(_MEMBER)
        content = b"" if member is None else member.read()
    if not _is_good(content):
        raise OSError(f"NiiVue {VERSION} came with another checksum than {SHA256}")
    SCRIPT.parent.mkdir(exist_ok=True)
    temporary = SCRIPT.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, SCRIPT)


def _packed() -> bytes:
    """The package of npm's registry."""
    npm = shutil.which("npm")
    if npm is not None:
        with tempfile.TemporaryDirectory() as folder:
            command = [npm, "pack", f"@niivue/niivue@{VERSION}", "--silent", "--pack-destination", folder]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
            packages = list(Path(folder).glob("*.tgz"))
            if done.returncode == 0 and packages:
                return packages[0].read_bytes()
    registry = os.environ.get("npm_config_registry") or "https://registry.npmjs.org"  # noqa: SIM112 (npm's name)
    url = f"{registry.rstrip('/')}/@niivue/niivue/-/niivue-{VERSION}.tgz"
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
        return answer.read()


def _is_good(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256


def main() -> None:
    """Fetch the script, and say where it is."""
    try:
        fetch()
    except (OSError, tarfile.TarError, KeyError, subprocess.TimeoutExpired) as error:
        print(f"voxquilt: NiiVue cannot be fetched ({error}); the report works without its viewer.", file=sys.stderr)
        sys.exit(2)
    print(SCRIPT)


if __name__ == "__main__":
    main()
