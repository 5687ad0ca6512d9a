"""Which files are in a folder, with links that lead nowhere and folders that are closed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from skiparse.models.data.report import Dropped


def walk(folder: Path, dropped: Dropped) -> Iterator[Path]:
    """Files in a folder and below, and links to files even if they lead nowhere.

    Those of a folder by name, and then those of the folders in it: of so many files only the names
    of one folder are held at once. Hidden ones are left out. Folders that cannot be looked into,
    and links to folders, which are not followed, are dropped.
    """

    def lost(error: OSError) -> None:
        dropped.add("a folder that cannot be opened", f"{error.filename}: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=lost):
        for name in list(folders):
            if name.startswith("."):
                folders.remove(name)
            elif os.path.islink(os.path.join(place, name)):
                dropped.add("a link to a folder, not followed", os.path.join(place, name))
        folders.sort()
        names.sort()
        yield from (Path(place, name) for name in names if not name.startswith("."))
