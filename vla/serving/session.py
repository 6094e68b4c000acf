"""One client's conversation with a policy: what it has to say, held to the contract, and what it is told.

An observation is a map. Its cameras may be called as the contract calls them, as openpi's examples do, or
by their bare name: ``observation.images.top``, ``observation/images/top``, ``observation/top``, ``top``,
and ``{"images": {"top": ...}}`` all mean the same, and so for the state. The instruction is ``prompt``
(openpi) or ``task`` (LeRobot). ``{"reset": seed}`` begins a new episode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from vla.contract import IMAGE_PREFIX, ContractError, PolicyContract

INSTRUCTION_KEYS = ("prompt", "task")
LONGEST_INSTRUCTION = 2000  # characters
DEEPEST = 4  # maps within maps


class Policy(Protocol):
    """What a session asks; one per client, so that it may keep state between the calls."""

    def reset(self, seed: int) -> None:
        """Forget the last episode; draw whatever is random from `seed`."""

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """Return actions (K, D). `images` maps a camera's key to (H, W, 3) uint8; `state` is float32."""


class Observation(NamedTuple):
    """An observation that fits the contract. `images` is keyed as the contract keys its cameras."""

    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str | None


class Session:
    """One client. `task` is the instruction until the client gives one; `rename` maps its keys to ours."""

    def __init__(
        self,
        policy: Policy,
        contract: PolicyContract,
        *,
        task: str | None = None,
        rename: Mapping[str, str] | None = None,
    ):
        self._policy, self._contract = policy, contract
        self._instruction, self._rename = task, dict(rename or {})
        self._policy.reset(0)

    def answer(self, message: Any) -> dict[str, Any]:
        """Return ``{"actions": (K, D) float32}``, or ``{"reset": seed}``.

        Raises `ContractError` for an observation that does not fit, after which the session goes on.
        """
        if isinstance(message, Mapping) and set(message) == {"reset"}:
            return self._reset(message["reset"])
        observation = read_observation(message, self._contract, self._rename)
        self._instruction = observation.instruction or self._instruction
        if not self._instruction:
            raise ContractError("The observation has no instruction: send the task in words as 'prompt'.")
        actions = self._policy.act(observation.images, observation.state, self._instruction)
        return {"actions": np.asarray(actions, np.float32)}

    def _reset(self, seed: Any) -> dict[str, Any]:
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ContractError(f"The seed of a reset is {seed!r}: send a non-negative integer.")
        self._policy.reset(seed)
        return {"reset": seed}


def read_observation(
    message: Any, contract: PolicyContract, rename: Mapping[str, str] | None = None
) -> Observation:
    """Hold a client's `message` to the contract. Raises `ContractError` with what is wrong in one sentence.

    Entries that the contract does not ask for are ignored.
    """
    if not isinstance(message, Mapping):
        raise ContractError(
            f"The message is a {type(message).__name__}, not an observation: send a map of cameras, state and"
            " prompt."
        )
    entries: dict[str, Any] = {}
    for key, value in _flat(message):
        name = short_name((rename or {}).get(key, key))
        if name in entries:
            raise ContractError(f"The observation has '{name}' twice; send it once.")
        entries[name] = value
    images = {}
    for camera in contract.interface.cameras:
        image = _entry(entries, camera.key, f"camera '{camera.key}'")
        expected = (camera.height, camera.width, 3)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != expected:
            raise ContractError(
                f"Camera '{camera.key}' sent {_describe(image)}, the policy expects uint8 {expected}: RGB,"
                " resized by the client."
            )
        images[camera.key] = image
    return Observation(images, _state(entries, contract), _instruction(entries))


def short_name(key: str) -> str:
    """Return ``top`` for ``observation.images.top``, ``observation/top`` and the like."""
    dotted = key.replace("/", ".").removeprefix("observation.")
    return dotted.removeprefix("images.")


def _flat(message: Mapping[Any, Any], prefix: str = ""):
    """Yield the entries of nested maps with their keys joined by dots."""
    if prefix.count(".") > DEEPEST:
        raise ContractError(f"The observation is nested more than {DEEPEST} maps deep.")
    for key, value in message.items():
        if not isinstance(key, str):
            raise ContractError(f"The observation has the key {key!r}: keys are text.")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _entry(entries: Mapping[str, Any], key: str, what: str) -> Any:
    name = short_name(key)
    if name not in entries:
        raise ContractError(
            f"The observation lacks {what}: send '{key.removeprefix(IMAGE_PREFIX)}'"
            f" (it has: {', '.join(sorted(entries)) or 'nothing'})."
        )
    return entries[name]


def _state(entries: Mapping[str, Any], contract: PolicyContract) -> np.ndarray:
    """Return the state (S,) float32, of no entries where the policy reads none."""
    need = contract.interface.state
    if need is None:
        return np.zeros(0, np.float32)
    sent = _entry(entries, need.key, "the state")
    try:
        state = np.asarray(sent, dtype=np.float32)
    except (TypeError, ValueError):
        raise ContractError(f"The state is {_describe(sent)}, not a list of numbers.") from None
    if state.shape != (need.dim,):
        raise ContractError(
            f"The state has shape {state.shape}, the policy expects {need.dim} entries"
            f" ({', '.join(need.names)})."
        )
    if not np.isfinite(state).all():
        bad = [name for name, value in zip(need.names, state, strict=True) if not np.isfinite(value)]
        raise ContractError(f"The state is not finite at {', '.join(bad)}.")
    return state


def _instruction(entries: Mapping[str, Any]) -> str | None:
    for key in INSTRUCTION_KEYS:
        text = entries.get(key)
        if text is None:
            continue
        if not isinstance(text, str) or not text.strip() or len(text) > LONGEST_INSTRUCTION:
            raise ContractError(
                f"'{key}' is {_describe(text)}: send the task in words, at most {LONGEST_INSTRUCTION}"
                " characters."
            )
        return str(text)
    return None


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"a {type(value).__name__}" if not isinstance(value, str) else f"text of {len(value)} characters"
