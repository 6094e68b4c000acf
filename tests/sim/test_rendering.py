import mujoco
import numpy as np
import pytest

from vla.errors import UserError
from vla.sim import rendering


def test_the_backend_renders_a_frame():
    assert rendering.prove_backend() in ("egl", "osmesa")


@pytest.mark.parametrize(("wanted", "installed"), [("", ()), ("egl", ("OSMesa",)), ("osmesa", ("EGL",))])
def test_without_a_library_the_remedy_is_named(monkeypatch, wanted, installed):
    monkeypatch.setenv("MUJOCO_GL", wanted)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name if name in installed else None)
    with pytest.raises(UserError, match=r"No rendering back-end.*apt install libegl1.*libosmesa6"):
        rendering.find_backend()


def test_an_explicit_choice_wins_and_an_unknown_one_is_refused(monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert rendering.find_backend() == "egl"
    monkeypatch.setenv("MUJOCO_GL", "OSMesa")
    assert rendering.find_backend() == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(UserError, match="MUJOCO_GL=glfw does not render without a display"):
        rendering.find_backend()


def test_two_renderers_do_not_disturb_each_other():
    # robosuite never makes its context current: there the first of two draws garbage, silently.
    scenes = [_scene("1 0 0 1"), _scene("0 1 0 1")]
    renderers = [rendering.OffscreenRenderer(model, 32) for model, _ in scenes]
    frames = [r.render(data, "eye") for r, (_, data) in zip(renderers, scenes, strict=True)]
    again = renderers[0].render(scenes[0][1], "eye")
    renderers[1].close()
    last = renderers[0].render(scenes[0][1], "eye")
    renderers[0].close()
    assert np.array_equal(frames[0], again) and np.array_equal(frames[0], last)
    assert frames[0][16, 16].argmax() == 0 and frames[1][16, 16].argmax() == 1


def _scene(rgba: str):
    model = mujoco.MjModel.from_xml_string(
        f"<mujoco><worldbody><light pos='0 -3 3'/><geom group='1' type='sphere' size='1' rgba='{rgba}'/>"
        "<camera name='eye' pos='0 -4 0' xyaxes='1 0 0 0 0 1'/></worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data
