"""A policy whose actions say what it was asked, and a server of it in a thread."""

import asyncio
import threading
import time
from contextlib import contextmanager

import numpy as np

from vla.contract import JOINT_POSITION, Camera, Interface, PolicyContract, Vector
from vla.serving.server import PolicyServer, Served

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
UNITS = ("deg",) * 5 + ("percent",)
CHUNK = 4


def arm_contract() -> PolicyContract:
    """A policy for a small arm: cameras of two sizes, six joints, 30 Hz."""
    return PolicyContract(
        Interface(
            cameras=(
                Camera("observation.images.top", 6, 8),
                Camera("observation.images.wrist", 4, 4),
            ),
            state=Vector("observation.state", JOINTS, UNITS),
            action=Vector("action", JOINTS, UNITS),
            action_space=JOINT_POSITION,
            control_rate=30.0,
        ),
        chunk_size=CHUNK,
        n_action_steps=2,
        normalization={"observation.state": "MEAN_STD", "action": "MIN_MAX"},
        statistics={"action": {"min": [-1.25] * 6, "max": [1 / 3] * 6}},
    )


def observation(value: int = 7, prompt: str | None = "pick up the cube") -> dict:
    """An observation in the keys of the contract."""
    return {
        "observation.images.top": np.full((6, 8, 3), value, np.uint8),
        "observation.images.wrist": np.full((4, 4, 3), value + 1, np.uint8),
        "observation.state": np.arange(6, dtype=np.float32),
    } | ({} if prompt is None else {"prompt": prompt})


class EchoPolicy:
    """Row k of the chunk: seed, calls since the reset, mean of top, mean of wrist, state sum, words + k."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def reset(self, seed):
        self.seed, self.calls = seed, 0

    def act(self, images, state, instruction):
        time.sleep(self.seconds)
        self.calls += 1
        assert state.dtype == np.float32 and all(image.dtype == np.uint8 for image in images.values())
        row = [
            self.seed,
            self.calls,
            images["observation.images.top"].mean(),
            images["observation.images.wrist"].mean(),
            state.sum(),
            len(instruction.split()),
        ]
        chunk = np.array([row] * CHUNK)
        chunk[:, 5] += np.arange(CHUNK)
        return chunk


@contextmanager
def running_server(make_policy=EchoPolicy, *, lines=None, **options):
    """Serve in a thread on a free port; yields the port."""
    served = {key: options.pop(key) for key in ("task", "rename") if key in options}
    server = PolicyServer(
        Served(make_policy, arm_contract(), {"checkpoint": {"label": "echo"}}, **served),
        report=(lines if lines is not None else []).append,
        **options,
    )
    ports, started = [], threading.Event()
    handle = {}

    async def serve():
        handle["loop"], handle["stop"] = asyncio.get_running_loop(), asyncio.Event()
        await server.run("127.0.0.1", 0, handle["stop"], lambda port: (ports.append(port), started.set()))

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(30)
        yield ports[0]
    finally:
        handle["loop"].call_soon_threadsafe(handle["stop"].set)
        thread.join(30)
        assert not thread.is_alive()
