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
_PACKAGE, _MEMBER = "@niivue/niivue", "package/dist/niivue.umd.js"
_TIMEOUT = 300.0  # seconds


def is_here() -> bool:
    """Whether the script is there, with its checksum."""
    return SCRIPT.is_file() and hashlib.sha256(SCRIPT.read_bytes()).hexdigest() == SHA256


def fetch() -> None:
    """Fetch the script, unless it is here.

    Raises:
        OSError: the registry cannot be reached, or what came is something else.
    """
    if is_here():
        return
    content = fetch_member(_PACKAGE, VERSION, _MEMBER, SHA256)
    SCRIPT.parent.mkdir(exist_ok=True)
    temporary = SCRIPT.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, SCRIPT)


def fetch_member(package: str, version: str, member: str, sha256: str) -> bytes:
    """A file of a package of npm's registry.

    Raises:
        OSError: the registry cannot be reached, or what came is something else.
    """
    with tarfile.open(fileobj=io.BytesIO(_packed(package, version)), mode="r:gz") as packed:
        file = packed.extractfile(member)
        content = b"" if file is None else file.read()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{package} {version} came with another checksum than {sha256}")
    return content


def _packed(package: str, version: str) -> bytes:
    npm = shutil.which("npm")
    if npm is not None:
        with tempfile.TemporaryDirectory() as folder:
            command = [npm, "pack", f"{package}@{version}", "--silent", "--pack-destination", folder]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
            packages = list(Path(folder).glob("*.tgz"))
            if done.returncode == 0 and packages:
                return packages[0].read_bytes()
    registry = os.environ.get("npm_config_registry") or "https://registry.npmjs.org"  # noqa: SIM112 (npm's name)
    url = f"{registry.rstrip('/')}/{package}/-/{package.rpartition('/')[2]}-{version}.tgz"
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
        return answer.read()


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
