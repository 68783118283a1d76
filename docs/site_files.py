"""Adds to the documentation's site the script by which its search works from disk, too (mkdocs.yml)."""

import logging
import subprocess
import tarfile

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from voxquilt.report.niivue import fetch_member

log = logging.getLogger("mkdocs")

# The theme would have it fetched from a server whenever a page is read. MIT; the licence is put beside it.
_PACKAGE, _VERSION = "iframe-worker", "1.0.4"
_MEMBERS = {
    "iframe-worker.js": ("package/shim/index.js", "e8e412dbcfea9b7e31b5ffa288d7b6035915e714c542f4176a0cdbe262fc9609"),
    "iframe-worker.txt": ("package/LICENSE", "dd69737a4768aab9f934a5aed9efab9561ac4062d4fdbe490d44369a2cf48b6b"),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Fetch the files; without npm's registry the site's search only works where a server serves the site."""
    try:
        for name, (member, checksum) in _MEMBERS.items():
            content = fetch_member(_PACKAGE, _VERSION, member, checksum)
            files.append(File.generated(config, f"assets/{name}", content=content))
    except (OSError, tarfile.TarError, KeyError, subprocess.TimeoutExpired) as error:
        log.info("the search will not work from disk: %s cannot be fetched (%s)", _PACKAGE, error)
    return files
