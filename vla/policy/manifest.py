"""Where a checkpoint comes from (``manifest.json``) and what it expects (its contract, from metadata)."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lerobot.configs import NormalizationMode

from vla.atomic import write_text
from vla.contract import ACTION_KEY, STATE_KEY, Interface, PolicyContract

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
DISTRIBUTION = "lerobot_policy_cogmerge"
#: The rule by which this checkpoint was chosen among those of its run.
LAST_STEP = "last step"
_STATISTICS = ("min", "max", "mean", "std", "q01", "q99")


def contract_from_metadata(config, dataset_meta) -> PolicyContract:
    """Build the contract of a policy trained on the dataset that `dataset_meta` describes.

    ``config.action_space`` wins over what the dataset says about its actions.
    """
    info = {"features": dataset_meta.features, "fps": dataset_meta.fps}
    offered = Interface.from_dataset(info, action_space=config.action_space)
    return make_contract(config, offered, dataset_meta.stats)


def make_contract(config, interface: Interface, statistics: dict[str, dict[str, Any]]) -> PolicyContract:
    """Build the contract of a policy with `config` that was trained on `interface` with `statistics`.

    The interface is narrowed to the cameras that the policy reads; statistics to state and action.
    """
    keys = set(config.camera_keys)
    narrowed = Interface(
        cameras=tuple(camera for camera in interface.cameras if camera.key in keys),
        state=interface.state if config.state_dim else None,
        action=interface.action,
        action_space=interface.action_space,
        control_rate=interface.control_rate,
    )
    vectors = [STATE_KEY] * bool(config.state_dim) + [ACTION_KEY]
    types = {STATE_KEY: "STATE", ACTION_KEY: "ACTION"}
    return PolicyContract(
        interface=narrowed,
        chunk_size=config.chunk_size,
        n_action_steps=config.n_action_steps,
        normalization={
            key: NormalizationMode(config.normalization_mapping[types[key]]).value for key in vectors
        },
        statistics={
            key: {
                name: [float(number) for number in statistics[key][name]]
                for name in _STATISTICS
                if name in statistics[key]
            }
            for key in vectors
        },
    )


def describe_build(policy, **facts: Any) -> dict[str, Any]:
    """Manifest of `policy`: versions, commit, parameter count, choice rule, and the caller's `facts`.

    Training adds ``seed``, ``step``, ``dataset`` and ``dataset_hash``.
    """
    return {
        "version": MANIFEST_VERSION,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "lerobot", "transformers", DISTRIBUTION)},
        },
        "commit": source_commit(),
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "choice": LAST_STEP,
        **facts,
    }


def source_commit() -> str | None:
    """Git commit of the source tree this package runs from, ``+dirty`` if modified; None outside a tree."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def save_manifest(folder: Path, manifest: dict[str, Any]) -> Path:
    """Write ``manifest.json`` into `folder` atomically and return its path."""
    return write_text(Path(folder) / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()
