"""Reading JSON that others wrote: an object, or one sentence that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vla.errors import UserError


def load_json(
    path: Path,
    *,
    absent: str | None = None,
    remedy: str = "copy it again",
    error: type[UserError] = UserError,
) -> dict[str, Any]:
    """Read a JSON object; raise `error` if the file is absent or holds anything else.

    `absent` is the whole sentence for a file that is not there (default: copy its folder again); `remedy`
    ends the sentence about one that cannot be used.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise error(absent or f"{path} does not exist; copy its folder again in full.") from None
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem}); {remedy}.") from None
    except ValueError as problem:
        raise error(f"{path} is not valid JSON ({problem}); {remedy}.") from None
    if not isinstance(content, dict):
        raise error(f"{path} does not hold a JSON object; {remedy}.")
    return content
