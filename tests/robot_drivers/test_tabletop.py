"""The emulated arm at its table: layouts, the goal, cameras, and the same world behind a serial port."""

import math
import time

import numpy as np
import pytest

from vla.robot_drivers import Disconnected
from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.emulation.cameras import EmulatedCamera, PublishedScene
from vla.robot_drivers.emulation.direct import direct_driver
from vla.robot_drivers.emulation.emulator import EmulatorError
from vla.robot_drivers.emulation.line import EmulatedLine
from vla.robot_drivers.emulation.renderer import SceneRenderer
from vla.robot_drivers.emulation.tabletop import APART, BOWL_INSIDE, CAMERAS, CUBE_HALF, Layout, Tabletop
from vla.robot_drivers.so101.calibration import load_calibration
from vla.robot_drivers.so101.driver import So101Driver

DT = 0.01
SIZE = (48, 64)


@pytest.fixture(scope="module")
def table() -> Tabletop:
    return Tabletop()


@pytest.fixture(scope="module")
def emulator():
    with Emulator(lockstep=DT, tabletop=7, cameras=SIZE) as emulator:
        yield emulator


def settle(table: Tabletop, seconds: float = 0.4) -> None:
    for _ in range(round(seconds / 0.004)):
        table.tick(0.004)


def test_a_layout_is_decided_by_its_seed_and_nothing_touches(table):
    layouts = [table.layout(seed) for seed in range(200)]
    assert layouts[:5] == [table.layout(seed) for seed in range(5)]
    assert len({layout.cube for layout in layouts}) == 200
    assert min(math.dist(it.cube[:2], it.bowl) for it in layouts) >= APART > 0.05 + CUBE_HALF * math.sqrt(2)
    for seed in range(40):
        table.reset(seed)
        names = [{table.model.geom(i).name for i in pair} for pair in table.data.contact.geom.tolist()]
        assert all("table" in pair or pair <= {"bowl_floor", "bowl_wall"} for pair in names)
    low, high = table.model.jnt_range[:6].T
    assert all(((low <= it.arm) & (it.arm <= high)).all() for it in layouts)
    sides = np.array([[it.cube[1], it.bowl[1]] for it in layouts])
    assert (sides.min(axis=0) < -0.1).all() and (sides.max(axis=0) > 0.1).all()


def test_what_is_put_on_the_table_stays_there(table):
    layout = table.reset(3)
    settle(table)
    position, rotation = table.cube_pose
    assert position == pytest.approx([*layout.cube[:2], CUBE_HALF], abs=1e-3)
    assert math.atan2(rotation[1, 0], rotation[0, 0]) == pytest.approx(layout.cube[2], abs=0.01)
    assert table.bowl_position[:2] == pytest.approx(layout.bowl, abs=1e-3)
    assert not table.success and not table.touching_bowl and not table.touching_hand


@pytest.mark.parametrize(
    ("offset", "height", "success"),
    [(0.0, 0.03, True), (BOWL_INSIDE - 0.012, 0.03, True), (0.075, CUBE_HALF, False), (0.0, 0.30, False)],
)
def test_the_goal_is_a_cube_that_rests_in_the_bowl(table, offset, height, success):
    table.reset(3)
    x, y, _ = table.bowl_position
    table._place(table._cube, [x + offset, y, height, 1.0, 0.0, 0.0, 0.0])
    settle(table, 0.6 if height < 0.1 else 0.1)  # the last one is still falling
    assert table.success is success


def test_a_cube_that_the_hand_still_touches_is_not_placed(table):
    """The open hand stands in the bowl beside the cube; the cube is put against its fixed jaw, and off it."""
    for gap, success in ((-0.0005, False), (0.004, True)):
        table.reset(3)
        table.plant.pose([*np.radians([0.0, 15.8, 1.0, 73.2, 3.0]), 0.8])
        for servo in table.servos:
            servo.write(40, b"\x01")
        jaw = table.data.geom("fixed_jaw")
        tip = jaw.xpos + jaw.xmat.reshape(3, 3) @ [0.003 + CUBE_HALF + gap, 0.0, -0.02]
        table._place(table._bowl, [tip[0], tip[1], 0.0, 1.0, 0.0, 0.0, 0.0])
        table._place(table._cube, [tip[0], tip[1], 0.0062 + CUBE_HALF, 1.0, 0.0, 0.0, 0.0])
        settle(table, 0.1)
        assert table.touching_hand is not success and table.touching_bowl
        assert table.success is success


def test_an_arm_at_its_rest_pose_hardly_falls(table):
    table.reset(0)
    before = table.plant.angles()
    settle(table, 1.0)
    assert np.abs(table.plant.angles() - before).max() < math.radians(6)


def test_frames_depend_on_positions_alone_and_show_what_moves(table):
    table.reset(1)
    renderer = SceneRenderer(table.model, *SIZE)
    try:
        start = table.data.qpos.copy()
        frames = {name: renderer.render(start, name) for name in CAMERAS}
        assert all(frame.shape == (*SIZE, 3) and frame.std() > 10 for frame in frames.values())
        table.arrange(Layout((0.2, -0.1, 0.0), (0.2, 0.1), ()))
        assert (renderer.render(table.data.qpos, "top") != frames["top"]).any()
        assert (renderer.render(start, "top") == frames["top"]).all()
        red = frames["top"].astype(int)
        assert ((red[..., 0] > 120) & (red[..., 1] < 70) & (red[..., 2] < 70)).sum() > 5  # the cube
    finally:
        renderer.close()


def test_a_published_scene_is_read_whole(tmp_path):
    scene = PublishedScene.create(tmp_path / "scene", 3)
    reader = PublishedScene(tmp_path / "scene")
    scene.write(1.5, np.array([1.0, 2.0, 3.0]))
    moment, qpos = reader.read()
    assert moment == 1.5 and qpos.tolist() == [1.0, 2.0, 3.0]


class Clock:
    """The time of a lockstep world."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def drive(driver: So101Driver, clock: Clock, look) -> list:
    """Swing the arm for a second; return what was sensed and, at the end, seen."""
    driver.open()
    driver.enable()
    start, sensed = driver.read().q, []
    for k in range(100):
        clock.now += DT
        share = (1 - math.cos(math.pi * min(k / 70, 1.0))) / 2
        driver.write(start + share * np.array([0.5, 0.6, -0.5, -0.3, 0.4, 0.6]))
        sensed.append(driver.read().q)
    frames = look()
    driver.close()
    return [np.array(sensed), *frames]


def test_the_serial_port_and_the_direct_bus_show_the_same_world(emulator, table):
    """Collected in one, run through the other: samples and frames are equal to the bit."""
    emulator.reset()
    calibration = load_calibration(emulator.calibration_file)
    assert calibration == table.calibration
    clock = Clock()
    serial = So101Driver(emulator.port, calibration, clock=clock, reply_timeout=5.0)
    cameras = [emulator.camera(name) for name in CAMERAS]
    over_wire = drive(serial, clock, lambda: [camera.read() for camera in cameras])
    assert emulator.look()["success"] is False
    for camera in cameras:
        camera.close()

    table.reset(7)
    renderer = SceneRenderer(table.model, *SIZE)
    clock = Clock()
    direct = direct_driver(EmulatedLine(world=table), calibration, DT, clock)
    in_process = drive(direct, clock, lambda: [renderer.render(table.data.qpos, name) for name in CAMERAS])
    renderer.close()
    for ours, theirs in zip(in_process, over_wire, strict=True):
        assert np.array_equal(ours, theirs)
    assert np.ptp(over_wire[0], axis=0).min() > 0.25


def test_in_real_time_the_arm_moves_with_the_clock_while_it_is_watched():
    created = time.monotonic()  # the world, which a busy computer may leave behind the clock, catches up
    with Emulator(tabletop=7, cameras=SIZE) as emulator:
        driver = So101Driver(emulator.port, emulator.calibration, reply_timeout=5.0)
        driver.open()
        driver.enable()
        start = driver.read().q
        began, world = time.monotonic(), emulator.look()["time"]
        goal = start + np.array([1.0, 0.0, -0.5, 0.0, 0.0, 0.0])
        driver.write(goal)
        camera = emulator.camera("top")
        frames = [camera.read()]
        while np.abs(driver.read().q - goal).max() > 0.01:
            frames.append(camera.read())
            assert time.monotonic() - began < 60
        assert (frames[0] != frames[-1]).any()
        now = emulator.look()["time"]
        assert now - world > 0.3 and now <= time.monotonic() - created  # a radian at 2.4 rad/s; never early
        camera.close()
        assert driver.disable() == []
        driver.close()


def test_things_are_rearranged_while_the_arm_stays(emulator, table):
    emulator.reset()
    before = emulator.look()
    emulator.arrange(11)
    after = emulator.look()
    assert after["cube"][:2] == pytest.approx(table.layout(11).cube[:2])
    assert after["angles"] == before["angles"] and after["cube"] != before["cube"]


def test_requests_that_cannot_be_are_one_sentence(emulator):
    with pytest.raises(Disconnected, match="no emulated camera 'left'"):
        emulator.camera("left")
    with pytest.raises(Disconnected, match="no emulated cameras at /nowhere"):
        EmulatedCamera("/nowhere", "top")
    with pytest.raises(EmulatorError, match="cannot be set"):
        emulator.set(1, encoder=2000)
    with pytest.raises(EmulatorError, match="give its seed"):
        Emulator(cameras=SIZE)
    with Emulator(1, lockstep=DT) as bus, pytest.raises(EmulatorError, match="no tabletop"):
        bus.look()
