"""Reading JSON that others wrote: an object, or one sentence that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vla.errors import UserError


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise `UserError` if the file is absent or holds anything else."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; copy its folder again in full.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; copy it again.")
    return content
