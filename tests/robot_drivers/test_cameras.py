"""Camera threads with real threads and cameras that block, fail and come back."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from vla.robot_drivers import cameras as module
from vla.robot_drivers.cameras import CameraFault, Cameras, StaleFrame, open_cameras

PATIENCE = 30.0  # s, for a loaded machine


class FakeCamera:
    """A camera whose frames are released one by one, and which can be broken."""

    def __init__(self, shape=(4, 6, 3), dtype=np.uint8, free_running=False):
        self.shape, self.dtype, self.free_running = shape, dtype, free_running
        self.frames = threading.Semaphore(0)
        self.connects = self.disconnects = self.reads = 0
        self.broken: Exception | None = None
        self.absent = False

    def connect(self):
        self.connects += 1
        if self.absent:
            raise ConnectionError("Failed to open\nFakeCamera")

    def read(self):
        if self.free_running:
            time.sleep(0.01)
        else:
            self.frames.acquire()
        if self.broken is not None:
            error, self.broken = self.broken, None
            raise error
        self.reads += 1
        return np.full(self.shape, self.reads, self.dtype)

    def disconnect(self):
        self.disconnects += 1
        if self.disconnects > self.connects:
            raise ConnectionError("not connected")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "RETRY_PAUSE", 0.02)
    monkeypatch.setattr(module, "CLOSE_TIMEOUT", 0.3)


def until(done):
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_newest_frame_and_its_age():
    top = FakeCamera()
    with Cameras({"top": top}) as cameras:
        assert cameras.latest() == {"top": None}
        before = time.monotonic()
        for _ in range(3):
            top.frames.release()
        until(lambda: cameras.latest()["top"] is not None and cameras.latest()["top"].sequence == 2)
        frame = cameras.fresh(max_age=PATIENCE)["top"]
        assert frame.image.shape == (4, 6, 3) and (frame.image == 3).all()
        assert 0 <= frame.age(time.monotonic()) <= time.monotonic() - before
        assert frame.age(frame.time + 1.5) == 1.5
        with pytest.raises(StaleFrame, match=r"'top' has given no picture for 2\.00 s \(allowed: 0\.25 s\)"):
            cameras.fresh(0.25, now=frame.time + 2.0)
        top.frames.release()  # lets the thread see that it shall stop
    assert top.disconnects >= 1


def test_a_camera_that_blocks_delays_neither_the_others_nor_the_reader_nor_the_end():
    stuck, running = FakeCamera(), FakeCamera(free_running=True)
    with Cameras({"stuck": stuck, "running": running}) as cameras:
        stuck.frames.release()
        cameras.wait_for_first(PATIENCE)
        begin = time.monotonic()
        for _ in range(1000):
            cameras.latest()
        assert time.monotonic() - begin < 1.0, "a thousand looks, while one camera blocks for ever"
        first = cameras.latest()["running"].sequence
        until(lambda: cameras.latest()["running"].sequence > first + 5)
        with pytest.raises(StaleFrame, match="'stuck'") as stale:
            cameras.fresh(0.0)
        assert stale.value.camera == "stuck" and stale.value.age > 0
        assert cameras.threads["running"].rate > 1 and cameras.threads["stuck"].rate == 0
        begin = time.monotonic()
        assert cameras.close() == ["stuck"]
        assert time.monotonic() - begin < 5
        assert running.disconnects == 1
        stuck.frames.release()
        until(lambda: cameras.close() == [] and stuck.disconnects == 1)


def test_a_camera_that_fails_is_opened_again_and_its_frames_grow_old_meanwhile():
    top = FakeCamera(free_running=True)
    with Cameras({"top": top}) as cameras:
        cameras.wait_for_first(PATIENCE)
        top.absent, top.broken = True, TimeoutError("timed out\nwaiting for a frame")
        until(lambda: top.connects > 2)
        old = cameras.latest()["top"]
        assert "Failed to open FakeCamera" in cameras.threads["top"].trouble
        with pytest.raises(StaleFrame, match="Failed to open FakeCamera"):
            cameras.fresh(0.0)
        top.absent = False
        until(lambda: cameras.latest()["top"].sequence > old.sequence)
        assert cameras.threads["top"].trouble is None
    assert top.disconnects == top.connects


def test_who_gives_no_first_picture_is_named_with_the_reason():
    absent, silent, well = FakeCamera(), FakeCamera(), FakeCamera(free_running=True)
    absent.absent = True
    with Cameras({"absent": absent, "silent": silent, "well": well}) as cameras:
        with pytest.raises(CameraFault) as fault:
            cameras.wait_for_first(0.3)
        said = str(fault.value)
        assert "'absent' (Failed to open FakeCamera)" in said and "gives nothing" in said
        assert "'well'" not in said and "\n" not in said
        with pytest.raises(StaleFrame, match="has given no picture yet"):
            cameras.fresh(1.0)
        silent.frames.release()


@pytest.mark.parametrize(
    "camera",
    [FakeCamera((3, 4, 6), free_running=True), FakeCamera(dtype=np.float32, free_running=True)],
)
def test_a_picture_that_is_none_is_refused(camera):
    with (
        Cameras({"top": camera}) as cameras,
        pytest.raises(CameraFault, match=r"a frame is .*not uint8 \(H, W, 3\)"),
    ):
        cameras.wait_for_first(0.2)


def test_lerobots_camera_class_is_used_and_a_missing_device_is_one_sentence():
    from lerobot.cameras.opencv import OpenCVCamera

    made = open_cameras(
        {"top": {"type": "opencv", "index_or_path": "/dev/video_none", "width": 8, "height": 6}}
    )
    assert isinstance(made["top"], OpenCVCamera) and (made["top"].width, made["top"].height) == (8, 6)
    with Cameras(made) as cameras, pytest.raises(CameraFault, match=r"'top' \(Failed to open OpenCVCamera"):
        cameras.wait_for_first(2.0)


@pytest.mark.parametrize(
    "config",
    [{"type": "opencvv", "index_or_path": 0}, {"type": "opencv", "index": 0}, {"index_or_path": 0}, {}],
)
def test_a_configuration_that_lerobot_does_not_take_is_one_sentence(config):
    with pytest.raises(CameraFault, match="Camera 'top' cannot be made") as fault:
        open_cameras({"top": config})
    assert "\n" not in str(fault.value)


def test_importing_cameras_imports_neither_torch_nor_lerobot():
    program = (
        "import sys, vla.robot_drivers.cameras; print(sorted({'torch', 'lerobot', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
