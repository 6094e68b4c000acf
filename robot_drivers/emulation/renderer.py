"""Headless rendering of a scene's cameras with EGL or OSMesa.

A frame depends on the positions ``qpos`` alone, so that whoever knows them draws the same one.
"""

from __future__ import annotations

import atexit
import ctypes.util
import functools
import os
import weakref
from importlib import import_module

import mujoco
import numpy as np

from vla.errors import UserError

LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
REMEDY = "Install libegl1 and libgl1-mesa-dri (or libosmesa6), or set MUJOCO_GL=egl or MUJOCO_GL=osmesa."


def rendering_backend() -> str:
    """Return "egl" or "osmesa": what ``MUJOCO_GL`` says, else what is installed, EGL first."""
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    candidates = [wanted] if wanted else list(LIBRARIES)
    for name in candidates:
        if name in LIBRARIES and ctypes.util.find_library(LIBRARIES[name]):
            return name
    raise UserError(f"The emulated cameras cannot draw: no {' or '.join(candidates)} here. {REMEDY}")


_LIVE: weakref.WeakSet[SceneRenderer] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
    """Free contexts before EGL shuts down: what is registered after MuJoCo's own hook runs before it."""
    atexit.register(lambda: [renderer.close() for renderer in list(_LIVE)])


class SceneRenderer:
    """Draws the cameras of `model` at `height` x `width` pixels. One thread owns it.

    Raises `UserError` when no OpenGL context can be made.
    """

    def __init__(self, model: mujoco.MjModel, height: int, width: int, multisample: int = 4):
        self.height, self.width = height, width
        self._model, self._data = model, mujoco.MjData(model)
        self._context: mujoco.MjrContext | None = None
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        model.vis.quality.offsamples = multisample
        backend = rendering_backend()
        os.environ["PYOPENGL_PLATFORM"] = backend
        try:
            # Not mujoco.GLContext: that is fixed when mujoco is first imported, by whomever.
            self._gl = import_module(f"mujoco.{backend}").GLContext(width, height)
            self._gl.make_current()
        except (AttributeError, ImportError, RuntimeError, OSError) as error:
            raise UserError(f"The emulated cameras cannot draw ({error}). {REMEDY}") from None
        _LIVE.add(self)
        _close_at_exit()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=200)
        self._option, self._perturbation = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def render(self, qpos: np.ndarray, camera: str) -> np.ndarray:
        """Return the frame of `camera` with the scene at `qpos`, (height, width, 3) uint8 RGB, upright."""
        self._data.qpos[:] = qpos
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)
        self._camera.fixedcamid = self._model.camera(camera).id
        self._gl.make_current()
        mujoco.mjv_updateScene(
            self._model,
            self._data,
            self._option,
            self._perturbation,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        viewport = mujoco.MjrRect(0, 0, self.width, self.height)
        mujoco.mjr_render(viewport, self._scene, self._context)
        frame = np.empty((self.height, self.width, 3), np.uint8)
        mujoco.mjr_readPixels(frame, None, viewport, self._context)
        return np.ascontiguousarray(frame[::-1])

    def close(self) -> None:
        """Free the context. Idempotent."""
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._context = None
