"""Selections of tasks and initial states on the command line, such as ``0,3,20-49``."""

from __future__ import annotations

from vla.errors import UserError


def parse_indices(text: str | None, count: int, missing: str) -> list[int]:
    """Parse a selection like ``"0,3,20-49"`` out of `count` indices, in order and without repeats.

    None selects all. Raises `UserError` for malformed text, or starting with `missing` for an index
    that does not exist.
    """
    if text is None:
        return list(range(count))
    chosen: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(
                f"'{text}' is not a selection; write single indices and ranges, for example 0,3,20-49."
            )
        for index in range(int(first), int(last if dash else first) + 1):
            if index >= count:
                raise UserError(f"{missing} {index}; there are 0 to {count - 1}.")
            chosen[index] = None
    if not chosen:
        raise UserError(f"'{text}' selects nothing; a range runs from the smaller to the larger index.")
    return list(chosen)
