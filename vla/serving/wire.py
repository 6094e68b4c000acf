"""The wire format of openpi: msgpack, with numpy arrays as maps of raw bytes, element type and shape.

    array   {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [8, 7]}
    scalar  {b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f8"}

Nothing that is read can run code: element types are plain numbers and text, object arrays are refused in
both directions, and an array's bytes must be exactly as many as its shape says. No torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from vla.errors import UserError

KINDS = "biufSU"
"""numpy's letters for the element types that travel: booleans, integers, floats, bytes and text."""

LARGEST_ELEMENT = 2**16
"""Bytes. An element type can name any size, which numpy would allocate even for an empty array."""

MIB = 2**20


class WireError(UserError):
    """A message that is not in the wire format, or holds what does not travel."""


def require_token(token: str | None) -> str | None:
    """Return a token that can travel in an HTTP header. Raises `WireError`."""
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise WireError("A token is made of plain letters, digits and signs, without spaces.")
    return token


def encode(message: Any) -> bytes:
    """Return `message` (maps, lists, numbers, text, bytes, numpy arrays) as bytes. Raises `WireError`."""
    try:
        return msgpack.packb(message, default=_pack)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"The message cannot be sent: {error}.") from None


def decode(data: bytes) -> Any:
    """Return what `encode`, or openpi's packer, made `data` of. Raises `WireError`.

    Arrays are copies that may be written to.
    """
    try:
        return msgpack.unpackb(data, object_hook=_unpack)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(
            f"The message is not msgpack ({' '.join(str(error).split()) or 'cut short'})."
        ) from None


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in KINDS:
        raise WireError(f"An array of type {value.dtype} does not travel; send numbers or text.")
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__} does not travel")


def _unpack(map: Mapping[Any, Any]) -> Any:
    if b"__ndarray__" in map:
        return _array(map)
    if b"__npgeneric__" in map:
        return _scalar(map)
    return map


def _scalar(map: Mapping[Any, Any]) -> Any:
    """Return the number that `map` describes; text stays text."""
    dtype, value = _dtype(map.get(b"dtype")), map.get(b"data")
    if isinstance(value, str | bytes) and dtype.kind in "SU":
        return value
    if isinstance(value, bool | int | float) and dtype.kind in "biuf":
        return dtype.type(value)
    raise WireError(f"A {dtype} was announced, but a {type(value).__name__} was sent.")


def _array(map: Mapping[Any, Any]) -> np.ndarray:
    """Return the array that `map` describes; its size is checked before anything is allocated."""
    dtype, data, shape = _dtype(map.get(b"dtype")), map.get(b"data"), map.get(b"shape")
    if (
        not isinstance(data, bytes)
        or not isinstance(shape, list | tuple)
        or len(shape) > 8
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise WireError(f"An array of shape {shape!r} cannot be: send bytes and a list of sizes.")
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise WireError(
            f"An array of shape {list(shape)} and type {dtype} takes {math.prod(shape) * dtype.itemsize}"
            f" bytes, but {len(data)} were sent."
        )
    return np.ndarray(tuple(shape), dtype, buffer=data).copy()


def _dtype(name: Any) -> np.dtype:
    """Return the element type called `name`. Raises `WireError` for all but plain numbers and text."""
    try:
        dtype = np.dtype(name) if isinstance(name, str) else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.kind not in KINDS or dtype.itemsize > LARGEST_ELEMENT:
        raise WireError(f"An array of type {name!r} does not travel; send numbers or text.")
    return dtype
