"""What a camera cannot see need not be drawn: frames stay the same bit for bit and cost less.

MuJoCo sends every triangle of the scene through the renderer, in view or not, and wherever a box reflects
(the stove's plate in LIBERO) all of them twice. The hand's camera needs few: 5 to 10 of 70 in libero_object.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

#: `mujoco.mjtGeom`, written out: which renderer MuJoCo uses is settled when it is imported, not here.
_PLANE, _BOX = 0, 6
#: Metres by which bounding boxes, and part of the view by which windows are widened, against rounding and
#: samples beside a pixel's centre.
_SLACK, _MARGIN = 1e-4, 0.02


class Window(NamedTuple):
    """A rectangle of the image plane at distance 1 in front of the camera: bounds of x / depth, y / depth."""

    left: float
    right: float
    bottom: float
    top: float

    def widened(self, by: float) -> Window:
        """The window with every side moved outwards."""
        return Window(self.left - by, self.right + by, self.bottom - by, self.top + by)


class View:
    """A camera as MuJoCo is about to use it for square frames. Its x is to the right, y up, depth ahead."""

    def __init__(self, position: np.ndarray, axes: np.ndarray, window: Window):
        self._position, self._axes = position, axes
        self._pad = _MARGIN * (window.right - window.left)
        self.window = window.widened(self._pad)

    @classmethod
    def of(cls, scene) -> View:
        """The view of a `mujoco.MjvScene` whose camera is up to date: midway between its two eyes.

        Raises `ValueError` for an orthographic camera, whose rays do not meet.
        """
        left, right = scene.camera[0], scene.camera[1]
        if left.orthographic:
            raise ValueError("What an orthographic camera sees is not known here.")
        forward, up = np.array(left.forward), np.array(left.up)
        half = (left.frustum_top - left.frustum_bottom) / 2
        sides = (left.frustum_center - half, left.frustum_center + half)
        bounds = (*sides, left.frustum_bottom, left.frustum_top)
        return cls(
            (np.array(left.pos) + np.array(right.pos)) / 2,
            np.stack([np.cross(forward, up), up, forward], axis=1),
            Window(*(bound / left.frustum_near for bound in bounds)),
        )

    def reaches(self, corners: np.ndarray, window: Window) -> np.ndarray:
        """Which convex bodies with these corners (n, 8, 3) may show in the window, (n,) bool.

        Never a false no: a body stays out only if all of it is behind the camera or beyond one side.
        """
        x, y, depth = np.moveaxis((corners - self._position) @ self._axes, -1, 0)
        inside = (depth > 0).any(axis=1)
        for along, low, high in ((x, window.left, window.right), (y, window.bottom, window.top)):
            inside &= (along >= low * depth).any(axis=1) & (along <= high * depth).any(axis=1)
        return inside

    def around(self, corners: np.ndarray) -> Window:
        """The window that a convex body with these corners (8, 3) fills.

        All of the view, where the body reaches behind the camera.
        """
        x, y, depth = ((corners - self._position) @ self._axes).T
        if (depth <= 0).any():
            return self.window
        x, y = x / depth, y / depth
        return Window(x.min(), x.max(), y.min(), y.max()).widened(self._pad)


def visible_geoms(model, data, view: View) -> np.ndarray:
    """Which geoms can show in the view, directly or in a reflecting box, (ngeom,) bool.

    All of them where there are shadows or a reflecting plane: what is out of view may show in these.
    """
    reflecting = _reflectance(model) > 0
    planes = model.geom_type == _PLANE
    if model.light_castshadow.any() or (reflecting & planes).any():
        return np.ones(model.ngeom, dtype=bool)
    corners = _corners(model, data)
    visible = planes | view.reaches(corners, view.window)
    for box in np.flatnonzero(visible & reflecting & (model.geom_type == _BOX)):
        above, images = _mirrored(corners, model, data, box)
        visible |= above & view.reaches(images, view.around(corners[box]))
    return visible


def _reflectance(model) -> np.ndarray:
    reflectance = np.zeros(model.ngeom)
    made = model.geom_matid >= 0
    reflectance[made] = model.mat_reflectance[model.geom_matid[made]]
    return reflectance


def _corners(model, data) -> np.ndarray:
    """The corners of every geom's bounding box, (ngeom, 8, 3) in the world."""
    signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), axis=-1).reshape(1, 8, 3)
    middle, half = model.geom_aabb[:, None, :3], model.geom_aabb[:, None, 3:] + _SLACK
    axes = data.geom_xmat.reshape(-1, 3, 3).transpose(0, 2, 1)
    return data.geom_xpos[:, None] + (middle + signs * half) @ axes


def _mirrored(corners: np.ndarray, model, data, box: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether geoms rise above the upper face of a box, the one that MuJoCo lets reflect, (ngeom,) bool, and
    the images of their corners behind it, (ngeom, 8, 3)."""
    normal = data.geom_xmat[box].reshape(3, 3)[:, 2]
    height = (corners - data.geom_xpos[box]) @ normal - model.geom_size[box, 2]
    return (height > 0).any(axis=1), corners - 2 * height[..., None] * normal
