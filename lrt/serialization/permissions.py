"""One rule for the permissions of all files that are written: those that the user's umask leaves."""

from __future__ import annotations

import tempfile
from pathlib import Path


def usual_permissions(place: Path) -> None:
    """Give a folder and all in it the permissions that a file made there has; some writers have rules of their own."""
    with tempfile.TemporaryDirectory(prefix=".permissions", dir=place) as name:
        probe = Path(name) / "probe"
        probe.mkdir()
        mode = probe.stat().st_mode & 0o777
    for path in (place, *place.rglob("*")):
        path.chmod(path.stat().st_mode & 0o7000 | (mode if path.is_dir() else mode & 0o666))
