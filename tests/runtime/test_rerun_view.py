"""The Rerun view, against the real library where the extra 'viz' is installed."""

import sys

import numpy as np
import pytest

from vla.errors import UserError
from vla.robot_drivers import Cycle, DriverInfo, Joint, Mode, State
from vla.runtime.chunk_scheduling import Query
from vla.runtime.robot.policy_thread import Answer, Observation
from vla.runtime.robot.rerun_view import RerunView

INFO = DriverInfo("two", (Joint("lift", -1.0, 1.0, 1, 1), Joint("turn", -1.0, 1.0, 1, 1)), 100.0, "falls")


def test_without_the_viewer_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(UserError, match=r"pip install 'lerobot_policy_cogmerge\[viz\]'"):
        RerunView("wave", INFO)


def test_what_the_policy_saw_and_the_arm_did_is_in_the_recording(tmp_path):
    rerun = pytest.importorskip("rerun")
    rerun.init("test")
    rerun.save(tmp_path / "run.rrd")
    view = RerunView("wave", INFO, spawn=False)
    query = Query(1, 0, 10.0)
    image = np.full((4, 6, 3), 9, np.uint8)
    view.observed(query, Observation({"observation.images.top": image}, np.zeros(2, np.float32), "wave"))
    view.answered(Answer(query, np.zeros((2, 2)), 0.05))
    state = State(10.0, 1, np.array([0.1, 0.2]), (True, True))
    for sent in (None, np.array([0.3, 0.4])):
        cycle = Cycle(10.1, Mode.TRACK, None, sent, state, True)
        view.asked_arm(10.1, {"lift": 0.5, "turn": 0.6}, cycle)
    rerun.disconnect()
    content = (tmp_path / "run.rrd").read_bytes()
    for path in (b"cameras/top", b"joints/lift/asked", b"joints/turn/sent", b"policy/latency_ms", b"task"):
        assert path in content
