"""What the tests of `vla run` share: a contract of six joints, a small untrained checkpoint, fake cameras."""

import asyncio
import contextlib
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np

from vla.contract import JOINT_POSITION, Camera, Interface, PolicyContract, Vector
from vla.robot_drivers.so101.calibration import JOINTS
from vla.robot_drivers.so101.driver import so101_info
from vla.serving.server import PolicyServer, Served

HEIGHT, WIDTH = 48, 64
RATE = 20.0
CHUNK = 16
UNITS = ("deg",) * 5 + ("percent",)
RAISED = (0.5, 0.3, 0.7, 0.6, 0.5, 0.5)
"""A pose clear of table and stops, as fractions of the calibrated ranges."""


def raised(info) -> np.ndarray:
    """`RAISED` in the arm's units, (6,)."""
    return info.lower + np.array(RAISED) * (info.upper - info.lower)


def arm_contract(calibration, *, rate=RATE, cameras=("top", "wrist")) -> PolicyContract:
    """A policy in LeRobot's units whose actions stay within 4° of the raised pose."""
    info = so101_info(calibration)
    centre = np.append(np.degrees(raised(info)[:5]), 100 * raised(info)[5])
    names = tuple(f"{joint}.pos" for joint in JOINTS)
    low, high = (centre - 4).tolist(), (centre + 4).tolist()
    middle = {"min": low, "max": high, "mean": centre.tolist(), "std": [10.0] * 6}
    return PolicyContract(
        Interface(
            cameras=tuple(Camera(f"observation.images.{name}", HEIGHT, WIDTH) for name in cameras),
            state=Vector("observation.state", names, UNITS),
            action=Vector("action", names, UNITS),
            action_space=JOINT_POSITION,
            control_rate=rate,
        ),
        chunk_size=CHUNK,
        n_action_steps=CHUNK // 2,
        normalization={"observation.state": "MEAN_STD", "action": "MIN_MAX"},
        statistics={"observation.state": middle, "action": middle},
    )


def save_untrained_arm_policy(folder, contract):
    """Save a small real policy with this contract, as it is before training."""
    import torch
    from lerobot.configs import FeatureType, PolicyFeature

    from vla.policy.checkpoint import save_checkpoint
    from vla.policy.configuration_cogmerge import CogMergeConfig
    from vla.policy.manifest import describe_build, make_contract
    from vla.policy.modeling_cogmerge import CogMergePolicy
    from vla.policy.processor_cogmerge import make_cogmerge_pre_post_processors

    need = contract.interface
    config = CogMergeConfig(
        device="cpu",
        image_size=32,
        chunk_size=contract.chunk_size,
        n_action_steps=contract.n_action_steps,
        input_features={
            camera.key: PolicyFeature(FeatureType.VISUAL, (3, camera.height, camera.width))
            for camera in need.cameras
        }
        | {"observation.state": PolicyFeature(FeatureType.STATE, (need.state.dim,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (need.action.dim,))},
    )
    torch.manual_seed(0)
    policy = CogMergePolicy(config)
    statistics = {
        key: {name: torch.tensor(numbers) for name, numbers in entry.items()}
        for key, entry in contract.statistics.items()
    }
    return save_checkpoint(
        folder,
        policy,
        *make_cogmerge_pre_post_processors(config, statistics),
        make_contract(config, need, contract.statistics),
        describe_build(policy, step=0),
    )


def save_arm_expert(folder, base, seed, instructions, shift=0.0):
    """Save an expert of the policy in `base`: random factors, actions `shift`ed by so many of its units."""
    import torch
    from safetensors.torch import load_file

    from vla.experts.lora_expert import LoraExpert, declare, make_config

    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors, ranks = {}, {}
    for name in (name for name in weights if name.endswith(("q_proj.weight", "v_proj.weight"))):
        module, (rows, columns) = name.removesuffix(".weight"), weights[name].shape
        ranks[module] = 2
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    contract = PolicyContract.load(base)
    action = {
        name: [it + shift for it in row] if name != "std" else row
        for name, row in contract.statistics["action"].items()
    }
    contract = replace(contract, statistics=contract.statistics | {"action": action})
    LoraExpert(make_config(ranks, 2), tensors, contract=contract).save(folder)
    declare(folder, folder.name, base, 1, instructions)
    return folder


class SwayPolicy:
    """Holds the arm near the pose of the mean action and sways by `amplitude` about it."""

    def __init__(self, contract, amplitude=3.0):
        self._amplitude = amplitude
        self._action = contract.statistics["action"]["mean"]
        self._calls = 0

    def reset(self, seed):
        self._calls = 0

    def act(self, images, state, instruction):
        self._calls += 1
        phase = (self._calls * CHUNK / 2 + np.arange(CHUNK)) / 10
        return np.array(self._action) + self._amplitude * np.sin(phase)[:, None]


@contextlib.contextmanager
def sway_server(contract, amplitude=3.0):
    """Serve a `SwayPolicy` from a thread; yields its address."""
    make = partial(SwayPolicy, contract, amplitude)
    server = PolicyServer(Served(make, contract, {"checkpoint": {"label": "sway"}}))
    ports, ready, handle = [], threading.Event(), {}

    async def serve():
        handle["loop"], handle["stop"] = asyncio.get_running_loop(), asyncio.Event()
        await server.run("127.0.0.1", 0, handle["stop"], lambda port: (ports.append(port), ready.set()))

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    try:
        yield f"ws://127.0.0.1:{ports[0]}"
    finally:
        handle["loop"].call_soon_threadsafe(handle["stop"].set)
        thread.join(30)


class FakeCamera:
    """Grey pictures at 60 Hz, from another thread's point of view a real camera. `stuck` makes it block."""

    def __init__(self, height=HEIGHT, width=WIDTH):
        self.size, self.stuck = (height, width, 3), False

    def connect(self):
        pass

    def read(self):
        time.sleep(1 / 60)
        while self.stuck:
            time.sleep(0.01)
        return np.full(self.size, 127, np.uint8)

    def disconnect(self):
        pass
