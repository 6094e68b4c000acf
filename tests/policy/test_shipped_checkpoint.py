"""The checkpoint in the package loads strictly, fits the simulator and answers."""

import numpy as np

from vla.evaluation.policy_source import SHIPPED_CHECKPOINT
from vla.policy.checkpoint import load_checkpoint
from vla.sim import sim_interface


def test_the_shipped_checkpoint_fits_the_simulator_and_acts():
    loaded = load_checkpoint(SHIPPED_CHECKPOINT)
    cameras = loaded.contract.interface.cameras
    loaded.contract.require(sim_interface(cameras[0].height), source="the simulator")
    images = {c.key: np.full((c.height, c.width, 3), 90, np.uint8) for c in cameras}
    state = np.zeros(loaded.contract.interface.state.dim, np.float32)
    first = loaded.act(images, state, "pick up the milk and place it in the basket")
    again = loaded.act(images, state, "pick up the milk and place it in the basket")
    assert first.shape == (loaded.contract.chunk_size, loaded.contract.interface.action.dim)
    assert np.isfinite(first).all()
    assert np.array_equal(first, again)


def test_the_shipped_checkpoint_is_small_and_says_where_it_comes_from():
    files = [path for path in SHIPPED_CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    manifest = load_checkpoint(SHIPPED_CHECKPOINT).manifest
    assert {"seed", "step", "dataset_hash"} <= manifest.keys()
