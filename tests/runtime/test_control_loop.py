"""The control loop with a fake arm and a fake clock: what is asked, sent and counted, and every end."""

import threading

import numpy as np
import pytest
from arm_bench import CHUNK, RATE, arm_contract, raised

from vla.robot_drivers import Cycle, Disconnected, Mode, ServoFault, State
from vla.robot_drivers.cameras import Frame, StaleFrame
from vla.robot_drivers.so101.calibration import JOINTS, JointCalibration
from vla.robot_drivers.so101.driver import so101_info
from vla.runtime.chunk_scheduling import make_scheduler
from vla.runtime.robot.control_loop import ControlLoop
from vla.runtime.robot.policy_thread import Answer, Observation, PolicyThread
from vla.runtime.robot.preflight import map_joints
from vla.serving.client import ServerLost

CALIBRATION = {name: JointCalibration(id, 0, 0, 1000, 3000) for id, name in enumerate(JOINTS, 1)}
INFO = so101_info(CALIBRATION)
CONTRACT = arm_contract(CALIBRATION)
HOME = raised(INFO)


class Clock:
    """Time passes when somebody sleeps, and a little more if told so."""

    def __init__(self):
        self.now, self.extra = 100.0, 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds + self.extra


class PerfectArm:
    """Goes where it is sent at once. `script` maps a period's number to a mode, or an exception."""

    info = INFO

    def __init__(self, clock, script=None):
        self.clock, self.script = clock, script or {}
        self.q, self.sent, self.looks = HOME.copy(), [], 0

    def latest(self):
        self.looks += 1
        event = self.script.get(self.looks, Mode.TRACK)
        if isinstance(event, Exception):
            raise event
        fault = ServoFault("elbow_flex", ["overload"], "Take the load off.") if event is Mode.FAULT else None
        state = State(self.clock.now, self.looks, self.q, (True,) * 6)
        return Cycle(self.clock.now, event, None, None, state, True, {}, fault)

    def setpoint(self, q, within=0.0):
        self.sent.append((self.clock.now, q))
        self.within = within
        self.q = np.array([q[name] for name in JOINTS])


class PromptPolicy:
    """Answers a fixed number of looks after it was asked, with what `rule` makes of the observation."""

    def __init__(self, delay=0, rule=None):
        self.delay, self.waiting, self.seen = delay, None, []
        self.rule = rule or (lambda observation: np.tile(observation.state.astype(float), (CHUNK, 1)))

    def ask(self, query, observation):
        self.seen.append(observation)
        self.waiting = [self.delay, query, observation]

    def answer(self):
        if self.waiting is None:
            return None
        self.waiting[0] -= 1
        if self.waiting[0] > 0:
            return None
        _, query, observation = self.waiting
        self.waiting = None
        chunk = self.rule(observation)
        if isinstance(chunk, Exception):
            return Answer(query, None, 0.0, chunk)
        return Answer(query, chunk, 0.01)


class SteadyCameras:
    """Frames that are always new, until `stale_from` periods have passed."""

    def __init__(self, stale_from=None):
        self.count, self.stale_from = 0, stale_from

    def fresh(self, max_age):
        self.count += 1
        if self.stale_from is not None and self.count >= self.stale_from:
            raise StaleFrame("wrist", 1.0, f"Camera 'wrist' has given no picture (allowed: {max_age:.2f} s).")
        image = np.full((48, 64, 3), self.count % 256, np.uint8)
        return {"top": Frame(image, 0.0, self.count), "wrist": Frame(255 - image, 0.0, self.count)}


def make_loop(policy=None, *, script=None, cameras=None, scheduler="real_time", **options):
    clock = Clock()
    arm = PerfectArm(clock, script)
    joints = map_joints(CONTRACT, INFO, None)
    loop = ControlLoop(
        arm,
        cameras or SteadyCameras(),
        policy or PromptPolicy(),
        make_scheduler(scheduler, CHUNK),
        CONTRACT,
        (joints.state, joints.action),
        "wave",
        **{"max_frame_age": 0.25, "policy_timeout": 3.0, "soft_start": 0.0} | options,
        clock=clock,
        sleep=clock.sleep,
    )
    return loop, arm, clock


def never():
    return None


def test_observations_are_in_the_contracts_units_and_actions_in_the_arms():
    def forward(observation):
        return observation.state + np.arange(1, CHUNK + 1)[:, None] * [0, 0, 0, 0, 1, -1]

    policy = PromptPolicy(rule=forward)
    loop, arm, _ = make_loop(policy)
    end = loop.run(never, seconds=0.28)
    assert not end.failed and end.reason == "The 0.28 s of this run are over."
    seen = policy.seen[0]
    assert seen.instruction == "wave" and list(seen.images) == [it.key for it in CONTRACT.interface.cameras]
    assert seen.images["observation.images.top"][0, 0, 0] == 1
    assert seen.images["observation.images.wrist"][0, 0, 0] == 254
    assert seen.state == pytest.approx([*np.degrees(HOME[:5]), 100 * HOME[5]], abs=1e-4)
    assert len(arm.sent) == 5  # the answer to the first look is there in the second period
    for k, (_, q) in enumerate(arm.sent, 1):
        assert q["wrist_roll"] == pytest.approx(HOME[4] + np.radians(k), abs=1e-6)
        assert q["gripper"] == pytest.approx(HOME[5] - k / 100, abs=1e-6)
        assert q["shoulder_pan"] == pytest.approx(HOME[0], abs=1e-6)


def test_the_rate_is_the_contracts_and_the_arm_never_waits_for_the_policy():
    loop, arm, clock = make_loop(PromptPolicy(delay=5))
    loop.run(never, seconds=10.0)
    status = loop.status
    assert status.periods == pytest.approx(10 * RATE, abs=1) and status.missed == 0
    assert status.rate == pytest.approx(RATE)
    assert status.delay == 5 and status.late == 0
    assert status.starved == 5, "it waits for the first answer, and for none after that"
    assert len(arm.sent) == status.periods - 5
    gaps = np.diff([now for now, _ in arm.sent])
    assert gaps == pytest.approx(1 / RATE) and arm.within == 1 / RATE
    assert clock.now == pytest.approx(110.0, abs=0.06)


def test_deadlines_are_absolute_and_what_is_missed_is_counted():
    loop, _, clock = make_loop()
    begins = []

    def stop():
        begins.append(clock.now)
        clock.now += 0.13 if len(begins) == 4 else 0.01  # the fourth period is 80 ms too long
        return "enough" if len(begins) == 10 else None

    end = loop.run(stop)
    assert end.reason == "enough" and not end.failed
    assert loop.status.missed == 2
    grid = (np.array(begins) - begins[0]) * RATE
    assert grid == pytest.approx([0, 1, 2, 3, 6, 7, 8, 9, 10, 11])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"script": {7: Mode.FAULT}}, "Joint 'elbow_flex' reports overload"),
        ({"script": {7: Mode.REST}}, "said nothing for so long that the arm went to rest"),
        ({"script": {7: Disconnected("The adapter is gone.")}}, "The adapter is gone"),
        ({"cameras": SteadyCameras(stale_from=7)}, r"Camera 'wrist' has given no picture \(allowed: 0\.25"),
        ({"policy": PromptPolicy(rule=lambda o: ServerLost("The server is gone."))}, "The server is gone"),
        ({"policy": PromptPolicy(rule=lambda o: np.full((CHUNK, 6), np.nan))}, "not finite"),
        ({"policy": PromptPolicy(delay=10**6)}, r"The policy has not answered for 3\.0"),
    ],
)
def test_whatever_fails_ends_the_run_with_its_sentence_and_sends_nothing_more(changes, words):
    loop, arm, clock = make_loop(**changes)
    end = loop.run(never, seconds=60.0)
    assert end.failed
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(end.reason)
    assert clock.now - 100 < 3.2
    assert len(arm.sent) <= 6 and all(np.isfinite(list(q.values())).all() for _, q in arm.sent)


def test_a_bug_in_the_policy_is_raised_as_it_is():
    loop, _, _ = make_loop(PromptPolicy(rule=lambda o: ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        loop.run(never, seconds=1.0)


def test_the_soft_start_bounds_the_first_seconds():
    far = [*np.degrees(HOME[:5] + 0.5), 90.0]
    loop, arm, _ = make_loop(PromptPolicy(rule=lambda o: np.tile(far, (CHUNK, 1))), soft_start=1.0)
    loop.run(never, seconds=3.0)
    path = np.array([[q[name] for name in JOINTS] for _, q in arm.sent])
    speeds = np.abs(np.diff(path, axis=0)) * RATE
    assert path[0] == pytest.approx(HOME) and path[-1, :5] == pytest.approx(HOME[:5] + 0.5)
    assert speeds[0].max() < 0.25 * INFO.velocity[0] and (speeds <= INFO.velocity + 1e-6).all()


class SlowPolicy:
    """Blocks until it is let go."""

    def __init__(self):
        self.go = threading.Semaphore(0)

    def reset(self, seed):
        pass

    def act(self, images, state, instruction):
        self.go.acquire()
        if instruction == "break":
            raise ZeroDivisionError("a bug")
        return [[1, 2], [3, 4]]


def test_the_policys_thread_neither_waits_nor_loses_what_went_wrong():
    policy = SlowPolicy()
    thread = PolicyThread(policy)
    scheduler = make_scheduler("execute_all", 2)
    try:
        for task in ("work", "break"):
            query = scheduler.ask(0.0)
            thread.ask(query, Observation({}, np.zeros(0), task))
            assert thread.answer() is None
            policy.go.release()
            while (answer := thread.answer()) is None:
                pass
            scheduler.abandon(query)
            assert answer.query == query
            if task == "work":
                assert answer.chunk.tolist() == [[1, 2], [3, 4]] and answer.error is None
            else:
                assert answer.chunk is None and isinstance(answer.error, ZeroDivisionError)
    finally:
        thread.close()
        policy.go.release()
    thread._thread.join(10)
    assert not thread._thread.is_alive()
