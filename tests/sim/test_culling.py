"""Leaving out what a camera cannot see: never a pixel's difference, and far fewer geoms."""

import mujoco
import numpy as np
import pytest

from vla.sim.culling import View, Window, visible_geoms
from vla.sim.rendering import OffscreenRenderer

AHEAD = np.array([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]]).T  # columns: right x, up z, ahead y
SQUARE = Window(-1, 1, -1, 1)


def scattered(seed: int, reflectance: float = 0.0, shadows: bool = False):
    """A camera among forty bodies on every side of it, above a plate that may reflect them."""
    rng = np.random.default_rng(seed)
    kinds = ("box", "ellipsoid", "capsule", "cylinder", "sphere")
    bodies = "".join(
        f"<geom group='1' type='{rng.choice(kinds)}' pos='{x} {y} {z}' size='{a} {b} {c}'"
        f" euler='{u} {v} {w}' rgba='{abs(x) % 1} {abs(y) % 1} {abs(z) % 1} {rng.choice([1, 0.5])}'/>"
        for x, y, z, a, b, c, u, v, w in np.hstack(
            [rng.uniform(-3, 3, (40, 3)), rng.uniform(0.05, 0.5, (40, 3)), rng.uniform(-180, 180, (40, 3))]
        )
    )
    lamps = f"<light pos='1 0 5' castshadow='false'/><light pos='0 2 5' castshadow='{str(shadows).lower()}'/>"
    look, tilt = rng.uniform(-180, 180), rng.uniform(-60, 20)
    model = mujoco.MjModel.from_xml_string(
        f"<mujoco><visual><quality shadowsize='512'/></visual><asset>"
        f"<material name='plate' reflectance='{reflectance}'/></asset>"
        f"<worldbody>{lamps}{bodies}"
        "<geom group='1' type='plane' size='0 0 1' pos='0 0 -3.5' rgba='.5 .6 .7 1'/>"
        "<geom group='1' type='box' size='1 1 .05' pos='.5 .5 -1' euler='8 5 20' material='plate'/>"
        f"<body euler='0 0 {look}'><body euler='{90 + tilt} 0 0'><camera name='eye' fovy='50'/></body></body>"
        "</worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def frames(model, data):
    """The frame as rendered, the frame with everything drawn, and how many geoms the first needed."""
    renderer = OffscreenRenderer(model, 96)
    try:
        frame = renderer.render(data, "eye")
        count = visible_geoms(model, data, View.of(renderer._scene)).sum()
        return frame, renderer.draw(data, np.ones(model.ngeom, dtype=bool)), count
    finally:
        renderer.close()


@pytest.mark.parametrize("reflectance", [0.0, 0.6])
def test_no_pixel_differs_and_most_geoms_are_left_out(reflectance):
    needed, showing = [], []
    for seed in range(12):
        model, data = scattered(seed, reflectance)
        groups = model.geom_group.copy()
        frame, everything, count = frames(model, data)
        assert np.array_equal(frame, everything), f"seed {seed}"
        assert np.array_equal(model.geom_group, groups), "what is hidden for a frame comes back"
        needed.append(count / model.ngeom)
        showing.append(frame.std() > 5)
    assert np.mean(needed) < 0.5 and np.mean(showing) > 0.9


def test_a_thing_out_of_view_is_drawn_for_its_image_in_the_plate():
    """The camera looks down at the plate, and by it at a ball beyond and above its view."""
    text = """<mujoco><asset><material name='plate' reflectance='{}'/></asset><worldbody>
        <light pos='0 -1 5' castshadow='false'/>
        <geom type='sphere' group='1' size='.3' pos='0 2.2 .7' rgba='1 0 0 1'/>
        <geom type='box' group='1' size='1 1 .1' pos='0 1 -.5' material='plate'/>
        <camera name='eye' pos='0 -1 .4' euler='60 0 0' fovy='40'/></worldbody></mujoco>"""
    red = []
    for reflectance in (0.8, 0.0):
        model = mujoco.MjModel.from_xml_string(text.format(reflectance))
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        frame, everything, count = frames(model, data)
        assert np.array_equal(frame, everything)
        red.append(((frame[..., 0].astype(int) - frame[..., 1] > 40).sum(), count))
    assert red[0][0] > 20 and red[0][1] == 2
    assert red[1] == (0, 1), "without its image it is not drawn"


@pytest.mark.parametrize("what", ["shadows", "plane"])
def test_everything_is_drawn_where_anything_may_show(what):
    model, data = scattered(3, shadows=what == "shadows")
    if what == "plane":
        model.geom_matid[model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE] = 0
        model.mat_reflectance[0] = 0.5
    frame, everything, count = frames(model, data)
    assert np.array_equal(frame, everything) and count == model.ngeom


@pytest.mark.parametrize(
    ("centre", "shows"),
    [
        ((0, 5, 0), True),
        ((0, -5, 0), False),
        ((5.4, 5, 0), True),  # its near side is still in view
        ((6.5, 5, 0), False),
        ((0, 5, -6.5), False),
        ((0, 0, 0), True),  # the camera is inside
    ],
)
def test_a_cube_against_a_view_of_ninety_degrees(centre, shows):
    signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), axis=-1).reshape(8, 3)
    view = View(np.zeros(3), AHEAD, SQUARE)
    assert view.reaches((np.array(centre) + 0.5 * signs)[None], view.window) == [shows]


def test_the_window_around_a_body():
    corners = np.array([[x, y, z] for x in (1, 2) for y in (4, 5) for z in (-1, 0)], dtype=float)
    view = View(np.zeros(3), AHEAD, SQUARE)
    pad = 0.02 * 2
    assert view.around(corners) == pytest.approx((1 / 5 - pad, 2 / 4 + pad, -1 / 4 - pad, 0 + pad))
    behind = corners - [0, 4.5, 0]
    assert view.around(behind) == view.window


def test_an_orthographic_camera_is_refused():
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><geom size='1'/><camera projection='orthographic'/></worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    scene, camera = mujoco.MjvScene(model, maxgeom=10), mujoco.MjvCamera()
    camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
    mujoco.mjv_updateCamera(model, data, camera, scene)
    with pytest.raises(ValueError, match="orthographic"):
        View.of(scene)
