"""Builds LIBERO's domain (robosuite's environment) lean and reproducible.

What is kept away from the rest of the package: the warnings of robosuite 1.4, the memory that building leaves
behind, the model fields that a reset overwrites, and the global random generators that LIBERO draws from.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import random
import warnings
from collections.abc import Iterator

import numpy as np

CONTROL_RATE = 20  # Hz


def build_domain(bddl_path: str):
    """Build LIBERO's domain for a BDDL file, without cameras and renderer (ours draws on demand)."""
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it asks for a private macro file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # robosuite 1.4 on Python 3.12: escape sequences, logger.warn
        import libero.libero.envs.bddl_utils as bddl_utils
        import robosuite
        from libero.libero.envs import TASK_MAPPING

    _disable_asset_cache()
    domain_class = TASK_MAPPING[bddl_utils.get_problem_info(bddl_path)["problem_name"]]
    domain = _remembering_pristine_model(domain_class)(
        bddl_file_name=bddl_path,
        robots=["Panda"],
        controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
        gripper_types="default",
        initialization_noise=None,
        use_camera_obs=False,
        has_offscreen_renderer=False,
        control_freq=CONTROL_RATE,
        ignore_done=True,
        hard_reset=False,
    )
    _forget_parsed_scene()
    return_freed_memory()
    # A reset hides the gripper's coloured markers; building leaves them in the picture.
    domain.visualize(vis_settings={name: False for name in domain._visualizations})
    return domain


def _disable_asset_cache() -> None:
    """Stop MuJoCo from keeping every mesh and texture file it has read, up to 0.5 GB per process."""
    import mujoco

    if hasattr(mujoco, "mj_setCacheCapacity"):  # the cache is older than the call that limits it
        mujoco.mj_setCacheCapacity(mujoco.mj_getCache(), 0)


def _forget_parsed_scene() -> None:
    """Free the scene that MuJoCo keeps for ``mj_saveLastXML``: 240 MB, the textures a second time.

    There is no Python call for it, but it keeps only the last scene that was parsed.
    """
    import mujoco

    mujoco.MjModel.from_xml_string("<mujoco/>")


def return_freed_memory() -> None:
    """Hand what the XML and mesh parsers or a closed scene freed back to the system (glibc keeps it)."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _remembering_pristine_model(domain_class: type) -> type:
    """Subclass a domain so that it keeps the model fields that its resets overwrite."""

    def _initialize_sim(self, xml_string=None):
        domain_class._initialize_sim(self, xml_string)
        fields = ("body_pos", "body_quat", "site_rgba")
        self.pristine = {name: getattr(self.sim.model, name).copy() for name in fields}

    # The domain compares its class name with the problem name of the BDDL file.
    return type(domain_class.__name__, (domain_class,), {"_initialize_sim": _initialize_sim})


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that LIBERO draws from, and give them back as they were."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
