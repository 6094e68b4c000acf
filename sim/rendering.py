"""Headless rendering: choosing EGL or OSMesa, and one off-screen renderer.

MuJoCo reads ``MUJOCO_GL`` once, when it is first imported, so `find_backend` runs before that;
`vla.sim` calls it on import.
"""

from __future__ import annotations

import atexit
import ctypes.util
import functools
import os
import weakref
from importlib import import_module

import numpy as np

from vla.errors import UserError
from vla.sim.culling import View, visible_geoms

REMEDY = (
    "Install a software renderer (Debian, Ubuntu: `apt install libegl1 libgl1-mesa-dri` for EGL or "
    "`apt install libosmesa6` for OSMesa) and set MUJOCO_GL=egl or MUJOCO_GL=osmesa."
)
_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
#: Not drawn, as MuJoCo's options stand; robosuite's visual geoms are in group 1.
_HIDDEN_GROUP = 5


def find_backend() -> str:
    """Choose "egl" or "osmesa", set ``MUJOCO_GL`` and ``PYOPENGL_PLATFORM``, and return the choice.

    An explicit ``MUJOCO_GL`` wins; otherwise EGL is preferred (it uses a GPU where there is one).
    Raises `UserError` when neither library is installed or the choice is unknown.
    """
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    if wanted and wanted not in _LIBRARIES:
        raise UserError(f"MUJOCO_GL={wanted} does not render without a display. {REMEDY}")
    for backend in [wanted] if wanted else _LIBRARIES:
        if ctypes.util.find_library(_LIBRARIES[backend]):
            os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = backend
            return backend
    missing = f"lib{_LIBRARIES[wanted]}" if wanted else "neither libEGL nor libOSMesa"
    raise UserError(f"No rendering back-end: {missing} was found on this machine. {REMEDY}")


def prove_backend() -> str:
    """Render one frame of a small scene and return the back-end's name.

    Raises `UserError` with the remedy when the frame cannot be made or is empty.
    """
    backend = find_backend()
    import mujoco

    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><light pos='0 0 3'/><geom group='1' type='sphere' size='1' rgba='1 0 0 1'/>"
        "<camera name='c' pos='0 -4 0' xyaxes='1 0 0 0 0 1'/></worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = OffscreenRenderer(model, image_size=64)
    try:
        frame = renderer.render(data, "c")
    finally:
        renderer.close()
    if frame.max() == 0:
        raise UserError(f"The rendering back-end '{backend}' returns black frames. {REMEDY}")
    return backend


_LIVE: weakref.WeakSet[OffscreenRenderer] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
    """Free contexts before EGL shuts down. Registered after MuJoCo's own hook, so it runs before it."""
    atexit.register(lambda: [renderer.close() for renderer in list(_LIVE)])


class OffscreenRenderer:
    """Renders fixed cameras of one model to square uint8 images.

    The visual settings are those of robosuite 1.4 (visual meshes on, collision meshes off), so frames
    equal its frames bit for bit, although what a camera cannot see is left out. The context is made current
    before every frame: robosuite never does that, and two of its environments in one process silently draw
    garbage.
    Raises `UserError` when no OpenGL context can be made.
    """

    def __init__(self, model, image_size: int, multisample: int = 4):
        import mujoco

        self._mujoco, self._model, self._size = mujoco, model, image_size
        self._context = None
        model.vis.quality.offsamples = multisample
        if not model.light_castshadow.any():
            model.vis.quality.shadowsize = 0  # an unused 4096 x 4096 shadow map is 64 MB
        model.vis.global_.offwidth = model.vis.global_.offheight = image_size
        try:
            # Not mujoco.GLContext: that is fixed when mujoco is first imported, by whomever.
            self._gl = import_module(f"mujoco.{find_backend()}").GLContext(image_size, image_size)
            self._gl.make_current()
        except (AttributeError, ImportError, RuntimeError, OSError) as error:
            raise UserError(f"No OpenGL context can be made ({error}). {REMEDY}") from None
        _LIVE.add(self)
        _close_at_exit()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:2] = 0, 1
        self._perturbation = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def render(self, data, camera: str) -> np.ndarray:
        """Return the (size, size, 3) uint8 frame of `camera`, rows from bottom to top as OpenGL reads.

        Raises `ValueError` for an orthographic camera.
        """
        mj = self._mujoco
        self._gl.make_current()
        self._camera.fixedcamid = mj.mj_name2id(self._model, mj.mjtObj.mjOBJ_CAMERA, camera)
        mj.mjv_updateCamera(self._model, data, self._camera, self._scene)
        return self.draw(data, visible_geoms(self._model, data, View.of(self._scene)))

    def draw(self, data, geoms: np.ndarray) -> np.ndarray:
        """Return the frame of the camera last rendered, of these `geoms` (ngeom,) bool if they are visual."""
        mj, groups = self._mujoco, self._model.geom_group.copy()
        viewport = mj.MjrRect(0, 0, self._size, self._size)
        self._model.geom_group[~geoms] = _HIDDEN_GROUP
        try:
            mj.mjv_updateScene(
                self._model,
                data,
                self._options,
                self._perturbation,
                self._camera,
                mj.mjtCatBit.mjCAT_ALL,
                self._scene,
            )
        finally:
            self._model.geom_group[:] = groups
        mj.mjr_render(viewport=viewport, scn=self._scene, con=self._context)
        frame = np.empty((self._size, self._size, 3), dtype=np.uint8)
        mj.mjr_readPixels(rgb=frame, depth=None, viewport=viewport, con=self._context)
        return frame

    def close(self) -> None:
        """Free the OpenGL objects; the renderer cannot be used afterwards."""
        if self._context is None:
            return
        self._gl.make_current()
        self._context.free()
        self._gl.free()
        self._context = self._gl = self._scene = None
