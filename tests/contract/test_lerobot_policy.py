"""The promise to LeRobot users: `lerobot-train --policy.type=cogmerge` trains, saves, resumes, offline."""

import functools
import subprocess
import sys

import draccus.wrappers.docstring
import numpy as np
import pytest
import torch

from vla.contract import OSC_POSE_DELTA
from vla.errors import UserError
from vla.policy.checkpoint import load_checkpoint

FPS = 10
ACTION_NAMES = ["x", "y", "z", "rx", "ry", "rz", "gripper"]


@pytest.fixture(scope="module", autouse=True)
def quick_docstrings():
    """draccus parses the docstring of every field anew for every flag: seconds per run."""
    module = draccus.wrappers.docstring
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_attribute_docstring", functools.cache(module.get_attribute_docstring))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two episodes of 12 frames with two cameras as video."""
    from lerobot.datasets import LeRobotDataset

    root = tmp_path_factory.mktemp("data") / "demo"
    camera = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    made = LeRobotDataset.create(
        "local/demo",
        fps=FPS,
        root=root,
        features={
            "observation.images.front": camera,
            "observation.images.wrist": camera,
            "observation.state": {"dtype": "float32", "shape": (8,), "names": [f"s{i}" for i in range(8)]},
            "action": {"dtype": "float32", "shape": (7,), "names": ACTION_NAMES},
        },
    )
    rng = np.random.default_rng(0)
    for task in ("open the drawer", "push the blorf"):
        for _ in range(12):
            made.add_frame(
                {
                    "observation.images.front": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
                    "observation.images.wrist": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
                    "observation.state": rng.normal(size=8).astype(np.float32),
                    "action": rng.uniform(-1, 1, 7).astype(np.float32),
                    "task": task,
                }
            )
        made.save_episode()
    made.finalize()
    return root


def lerobot_train(*flags: str) -> None:
    """Run `lerobot-train` in this process: importing torch and LeRobot once is half the test's time."""
    from lerobot.scripts.lerobot_train import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lerobot-train", *flags])
        main()


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A finished run of five steps, with a checkpoint after two."""
    output = tmp_path_factory.mktemp("out") / "run"
    lerobot_train(
        "--policy.type=cogmerge",
        "--policy.image_size=32",
        "--policy.chunk_size=4",
        "--policy.n_action_steps=2",
        f"--policy.action_space={OSC_POSE_DELTA}",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=local/demo",
        f"--dataset.root={dataset}",
        f"--output_dir={output}",
        "--steps=5",
        "--save_freq=2",
        "--log_freq=1",
        "--batch_size=4",
        "--num_workers=0",
        "--wandb.enable=false",
    )
    return output


def test_lerobot_checkpoint_is_complete_and_loads_strictly(run):
    loaded = load_checkpoint(run)
    interface = loaded.contract.interface
    assert [camera.key for camera in interface.cameras] == [
        "observation.images.front",
        "observation.images.wrist",
    ]
    assert interface.action.names == tuple(ACTION_NAMES) and interface.control_rate == FPS
    assert interface.action_space == OSC_POSE_DELTA
    assert loaded.manifest["versions"]["lerobot"].startswith("0.6")
    images = {name: np.zeros((64, 64, 3), np.uint8) for name in ("front", "wrist")}
    chunk = loaded.act(images, np.zeros(8, np.float32), "open the drawer")
    assert chunk.shape == (4, 7) and np.isfinite(chunk).all()


def test_lerobot_factory_gives_the_same_actions(run):
    """`lerobot-eval` and `lerobot-rollout` load through the factory, without our loader."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import get_policy_class, make_pre_post_processors

    ours = load_checkpoint(run)
    config = PreTrainedConfig.from_pretrained(ours.path)
    policy = get_policy_class(config.type).from_pretrained(ours.path)
    pre, post = make_pre_post_processors(config, pretrained_path=str(ours.path))
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    state = np.linspace(-1, 1, 8, dtype=np.float32)
    frame = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    batch = pre(
        {
            "observation.images.front": frame,
            "observation.images.wrist": frame,
            "observation.state": torch.from_numpy(state)[None],
            "task": ["open the drawer"],
        }
    )
    chunk = ours.act({"front": image, "wrist": image}, state, "open the drawer")
    for expected in chunk[:2]:
        np.testing.assert_allclose(post(policy.select_action(batch))[0].numpy(), expected, atol=1e-6)


def test_resume_continues_the_run(run):
    lerobot_train(
        f"--config_path={run}/checkpoints/last/pretrained_model/train_config.json",
        "--resume=true",
        "--steps=7",
    )
    steps = sorted(entry.name for entry in (run / "checkpoints").iterdir())
    assert steps == ["000002", "000004", "000005", "000006", "000007", "last"]
    before, after = load_checkpoint(run / "checkpoints" / "000005"), load_checkpoint(run)
    assert before.contract == after.contract
    moved = [
        not torch.equal(a, b)
        for a, b in zip(before.policy.parameters(), after.policy.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2


def test_resume_refuses_a_truncated_checkpoint(run):
    weights = run / "checkpoints" / "last" / "pretrained_model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        lerobot_train(
            f"--config_path={run}/checkpoints/last/pretrained_model/train_config.json",
            "--resume=true",
            "--steps=9",
        )
    weights.write_bytes(whole)


def test_lerobot_discovers_the_plugin_and_imports_no_modelling_code():
    code = (
        "import sys; from lerobot.utils.import_utils import register_third_party_plugins;"
        "register_third_party_plugins(); from lerobot.configs import PreTrainedConfig;"
        "assert 'cogmerge' in PreTrainedConfig.get_known_choices();"
        "assert 'vla.policy.modeling_cogmerge' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)
