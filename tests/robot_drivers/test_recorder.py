"""Records of runs: what is read back is what happened, also after a crash; a bad disk never stops an arm."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.errors import UserError
from vla.robot_drivers import (
    BusCorrupt,
    BusTimeout,
    Cycle,
    Disconnected,
    DriverFault,
    DriverInfo,
    Joint,
    LimitViolation,
    Mode,
    Recorder,
    ServoFault,
    State,
    read_record,
)
from vla.robot_drivers.wire import (
    cycle_from_json,
    cycle_to_json,
    fault_from_json,
    fault_to_json,
    info_from_json,
    info_to_json,
)

INFO = DriverInfo("arm", (Joint("a", -1, 1, 2, 10), Joint("b", 0, 2, 1, 5)), 50, "falls", rest=(0.0, 0.5))


def cycle(time: float, **changes) -> Cycle:
    state = State(time, 7, np.array([0.1, time]), (True, False), temperature=np.array([30.0, 31.0]))
    values = {"asked": {"a": 0.1, "b": 0.2}, "sent": np.array([0.1, 0.2]), "state": state, "fresh": True}
    return Cycle(**{"time": time, "mode": Mode.TRACK} | values | changes)


def write(path, cycles) -> None:
    with Recorder(path, INFO) as recorder:
        for it in cycles:
            recorder.add(cycle_to_json(it))


def test_a_record_reads_back_as_what_happened(tmp_path):
    path = tmp_path / "runs" / "one.jsonl"
    fault = ServoFault("b", ["overload"], "Take the load off.")
    cycles = [
        cycle(1.0),
        cycle(1.02, asked=None, sent=None, fresh=False),
        cycle(1.04, asked={"a": math.nan, "b": "x"}, interventions={"setpoint": "no"}, fault=fault),
    ]
    write(path, cycles)
    record = read_record(path)
    assert record.whole and record.info == INFO
    assert record.times.tolist() == [1.0, 1.02, 1.04]
    np.testing.assert_array_equal(record.asked, [[0.1, 0.2], [np.nan] * 2, [np.nan] * 2])
    np.testing.assert_array_equal(record.sent, [[0.1, 0.2], [np.nan] * 2, [0.1, 0.2]])
    np.testing.assert_array_equal(record.measured, [[0.1, 1.0], [np.nan] * 2, [0.1, 1.04]])
    last = record.cycles[-1]
    assert isinstance(last.fault, ServoFault) and str(last.fault) == str(fault)
    assert last.interventions == {"setpoint": "no"} and last.state.enabled == (True, False)


FLOATS = st.floats(allow_nan=False)


@settings(max_examples=60)
@given(FLOATS, st.lists(FLOATS, min_size=2, max_size=2), st.sampled_from(list(Mode)))
def test_numbers_survive_to_the_last_bit(time, values, mode):
    state = State(time, 0, np.array(values), (True, True), dq=np.array(values[::-1]))
    sent = cycle(
        time, mode=mode, state=state, sent=np.array(values), asked=dict(zip("ab", values, strict=True))
    )
    back = cycle_from_json(json.loads(json.dumps(cycle_to_json(sent))))
    assert back.time == time and back.mode is mode and back.asked == sent.asked
    np.testing.assert_array_equal(back.sent, sent.sent)
    np.testing.assert_array_equal(back.state.dq, state.dq)
    assert back.state.tau is None and back.state.time == time


@pytest.mark.parametrize(
    "fault",
    [
        BusTimeout(["a"], "silent"),
        BusCorrupt(["a", "b"], "noise"),
        Disconnected("gone"),
        LimitViolation("far"),
        DriverFault("bad"),
        ServoFault("a", ["voltage", "overload"], "Look."),
        UserError("no"),
    ],
)
def test_faults_come_back_as_what_they_were(fault):
    back = fault_from_json(json.loads(json.dumps(fault_to_json(fault))))
    assert type(back) is type(fault) and str(back) == str(fault)
    assert getattr(back, "joints", None) == getattr(fault, "joints", None)
    assert getattr(back, "conditions", None) == getattr(fault, "conditions", None)


def test_a_description_comes_back_as_it_was():
    assert info_from_json(json.loads(json.dumps(info_to_json(INFO)))) == INFO


CRASH = """
import os, sys, time
from vla.robot_drivers import Recorder
from vla.robot_drivers.wire import info_from_json
import json
recorder = Recorder(sys.argv[1], info_from_json(json.loads(sys.argv[2])))
line = json.loads(sys.argv[3])
while True:
    recorder.add(line)
    time.sleep(0.001)
"""


def test_a_killed_program_leaves_what_it_wrote(tmp_path):
    path = tmp_path / "run.jsonl"
    arguments = [str(path), json.dumps(info_to_json(INFO)), json.dumps(cycle_to_json(cycle(1.0)))]
    program = subprocess.Popen([sys.executable, "-P", "-c", CRASH, *arguments])
    partial = tmp_path / "run.jsonl.partial"
    while not partial.exists() or partial.stat().st_size < 20_000:
        assert program.poll() is None
    program.kill()
    program.wait()
    assert not path.exists()
    with open(partial, "ab") as file:  # the line that the crash cut short
        file.write(b'{"time": 3.0, "mo')
    record = read_record(partial)
    assert not record.whole and len(record.cycles) > 10
    assert all(it.time == 1.0 for it in record.cycles)


def test_records_are_never_overwritten(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, [cycle(1.0)])
    before = path.read_bytes()
    with pytest.raises(UserError, match="already a record"):
        Recorder(path, INFO)
    assert path.read_bytes() == before
    (tmp_path / "other.jsonl.partial").write_text("")
    with pytest.raises(UserError, match="was not finished"):
        Recorder(tmp_path / "other.jsonl", INFO)
    with pytest.raises(UserError, match="cannot be written"):
        Recorder(path / "below_a_file.jsonl", INFO)


def test_a_record_of_nothing_is_not_kept(tmp_path):
    write(tmp_path / "run.jsonl", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_and_does_not_raise(tmp_path):
    full = FullRecorder(tmp_path / "full.jsonl", INFO)
    for _ in range(1000):
        full.add(cycle_to_json(cycle(1.0)))
    full.close()
    assert "No space left" in full.trouble and not full.path.exists()


class FullRecorder(Recorder):
    """A recorder whose file lies on a device that is always full."""

    def _write(self) -> None:
        self._file.close()
        self._file = open("/dev/full", "w", buffering=1 << 12)  # noqa: SIM115
        super()._write()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("", "not a record"),
        ("{}", "not a record"),
        ('{"format": "other/9"}', "of format 'other/9'"),
        ("[1]", "not a record"),
    ],
)
def test_what_is_no_record_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        read_record(path)


def test_damage_in_the_middle_of_a_whole_record_is_not_passed_over(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, [cycle(1.0), cycle(2.0)])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-9], lines[2]]) + "\n")
    with pytest.raises(UserError, match="damaged"):
        read_record(path)
