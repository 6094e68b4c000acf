"""The picture of a record shows what the record holds: curves, rates, modes, faults; against hand counts."""

import math

import numpy as np
import pytest
from matplotlib.image import imread

from vla import cli
from vla.errors import UserError
from vla.robot_drivers import Cycle, DriverInfo, Joint, Mode, Record, Recorder, ServoFault, State
from vla.robot_drivers.commands.plot import summary
from vla.robot_drivers.record_plot import (
    draw_record,
    first_faults,
    new_setpoints,
    rate,
    record_figure,
    spans,
)
from vla.robot_drivers.wire import cycle_to_json

INFO = DriverInfo(
    "arm",
    (
        Joint("hip", -1, 1, 2, 10),
        Joint("grip", 0, 1, 1, 5, unit="fraction", kind="gripper"),
        Joint("lift", 0, 0.5, 1, 5, unit="m", kind="prismatic"),
    ),
    10,
    "falls",
)
OVERLOAD = ServoFault("hip", ["overload"], "Take the load off.")


def cycle(k: int, mode=Mode.TRACK, asked=0.2, sent=0.1, fresh=True, **changes) -> Cycle:
    """Cycle `k` of 10 Hz, 5 s after the machine was started, with every joint at 0.05."""
    state = State(5 + k / 10, k, np.full(3, 0.05), (True,) * 3)
    wanted = None if asked is None else dict.fromkeys(INFO.joint_names, asked)
    goal = None if sent is None else np.full(3, sent)
    return Cycle(5 + k / 10, mode, wanted, goal, state, fresh, **changes)


def record(*cycles: Cycle) -> Record:
    return Record(INFO, cycles, 0.0, True)


RUN = record(
    *(cycle(k, Mode.HOLD, asked=None) for k in range(5)),
    *(cycle(k, asked=0.01 * k, interventions={"hip": "limit"}) for k in range(5, 15)),
    *(cycle(k, Mode.FAULT, None, None, fresh=False, fault=OVERLOAD) for k in range(15, 20)),
)


def curve(panel, label: str) -> np.ndarray:
    (line,) = [it for it in panel.lines if it.get_label() == label]
    return np.array(line.get_ydata(), float)


def test_every_joint_has_its_three_curves_in_a_readable_unit():
    panels = record_figure(RUN).axes
    assert [panel.get_ylabel() for panel in panels] == [
        "hip\n(°)",
        "grip\n(%)",
        "lift\n(mm)",
        "rate (Hz)",
    ]
    for panel, scale in zip(panels, (180 / math.pi, 100, 1000), strict=False):
        asked, sent, measured = (curve(panel, name) for name in ("asked", "sent", "measured"))
        assert np.isnan(asked[:5]).all() and asked[5:15] == pytest.approx(scale * 0.01 * np.arange(5, 15))
        assert sent[:15] == pytest.approx(scale * 0.1) and np.isnan(sent[15:]).all()
        assert measured[:15] == pytest.approx(scale * 0.05) and np.isnan(measured[15:]).all()
    ticks = [it for it in panels[0].lines if it.get_label() == "changed by the filter"]
    assert list(ticks[0].get_xdata()) == pytest.approx(np.arange(5, 15) / 10)
    assert not [it for it in panels[1].lines if it.get_label() == "changed by the filter"]


def test_modes_and_faults_are_where_they_happened():
    assert [(it.mode, it.begin, it.end) for it in spans(RUN)] == [
        (Mode.HOLD, 0.0, pytest.approx(0.5)),
        (Mode.TRACK, pytest.approx(0.5), pytest.approx(1.5)),
        (Mode.FAULT, pytest.approx(1.5), pytest.approx(1.9)),
    ]
    assert first_faults(RUN) == [(pytest.approx(1.5), str(OVERLOAD))]
    other = ServoFault("grip", ["overheating"])
    twice = record(cycle(0, fault=OVERLOAD), cycle(1), cycle(2, fault=OVERLOAD), cycle(3, fault=other))
    assert [sentence for _, sentence in first_faults(twice)] == [*[str(OVERLOAD)] * 2, str(other)]
    figure = record_figure(RUN)
    assert "1: at 1.50 s: Joint 'hip' reports overload" in figure.axes[-1].get_xlabel()
    assert {it.get_text() for it in figure.legends[0].texts} == {
        *("asked", "sent", "measured", "changed by the filter", "hold", "fault")
    }


def test_rates_are_counted_over_a_quarter_of_a_second():
    middles, counts = rate(np.array([0.0, 0.1, 0.2, 0.3, 0.9]), 1.0)
    assert middles.tolist() == [0.125, 0.375, 0.625, 0.875]
    assert counts.tolist() == [12.0, 4.0, 0.0, 4.0]
    middles, counts = rate(np.array([0.0]), 0.0)  # a record of one cycle
    assert counts.tolist() == [4.0]
    assert new_setpoints(RUN).tolist() == [False] * 5 + [True] * 10 + [False] * 5
    assert new_setpoints(record(cycle(0), cycle(1), cycle(2, asked=0.3))).tolist() == [True, False, True]


def test_words_say_what_stands_out():
    first, second, third = summary(RUN)
    assert first == ("20 control periods in 1.9 s at 10.0 Hz; 5 without a sample; the filter acted in 10.")
    assert second == "'lift' was furthest from its command, by 10.0% of its range."  # 0.05 of 0.5
    assert third == f"Fault at 1.50 s: {OVERLOAD}"
    assert summary(record(cycle(0, sent=None))) == [
        "1 control periods in 0.0 s; 0 without a sample; the filter acted in 0."
    ]


def test_the_command_draws_a_file_and_refuses_what_it_cannot(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    with Recorder(path, INFO) as recorder:
        for it in RUN.cycles:
            recorder.add(cycle_to_json(it))
    assert cli.run(["robot", "plot", str(path)]) == 0
    assert "20 control periods" in capsys.readouterr().out
    picture = imread(tmp_path / "run.png")
    assert picture.shape[1] == 1320 and np.ptp(picture) > 0.5
    assert cli.run(["robot", "plot", str(path), "--out", str(tmp_path / "run.svg")]) == 0
    assert "</svg>" in (tmp_path / "run.svg").read_text()
    assert cli.run(["robot", "plot", str(path), "--out", str(tmp_path / "run.doc")]) == 2
    assert "name a file that ends in" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing to draw"):
        draw_record(record(), tmp_path / "none.png")
