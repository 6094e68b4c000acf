"""`vla bank fit-probe`: from datasets to a router that knows its scenes; a new expert needs its data only."""

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset
from tiny_skills import SIZE, observation, save_tiny_base, save_tiny_expert

from vla import cli
from vla.evaluation.probe_fitting import choose_frames
from vla.experts.bank_folder import BankFolder
from vla.experts.bank_policy import BankPolicy
from vla.experts.multi_expert import Observation
from vla.experts.task_routers import make_task_router
from vla.experts.task_routers.router import RouterSettings
from vla.training.dataset import open_demonstrations
from vla.training.task_choice import choose_tasks

SHADES = {"dark": 0, "middle": 90, "bright": 180}


def shaded(shade, seed):
    seen = observation(seed)
    return {name: image // 5 + shade for name, image in seen.images.items()}, seen.state


def write_dataset(root, shade, seed, episodes=5, length=6, tasks=("find the light",)):
    features = {
        f"observation.images.{name}": {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": None}
        for name in ("image", "image2")
    }
    features |= {
        "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
    }
    dataset = LeRobotDataset.create(root.name, fps=20, features=features, root=root, use_videos=False)
    for episode in range(episodes):
        for step in range(length):
            images, state = shaded(shade, seed + 100 * episode + step)
            frame = {f"observation.images.{name}": image.astype(np.uint8) for name, image in images.items()}
            frame |= {"observation.state": state, "action": np.tanh(state[:7])}
            dataset.add_frame(frame | {"task": tasks[episode % len(tasks)]})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    base = save_tiny_base(folder / "base")
    for seed, (name, shade) in enumerate(SHADES.items(), 1):
        save_tiny_expert(folder / name, base, seed)
        write_dataset(folder / f"{name}-data", shade, seed)
    return folder


def test_fitting_and_routing(scene, capsys):
    bank = BankFolder.create(scene / "bank", scene / "base", [scene / "dark", scene / "middle"])
    data = [f"{name}={scene / name}-data" for name in SHADES]
    assert cli.run(["bank", "fit-probe", str(scene / "bank"), "--data", data[0]]) == 2
    assert "No frames of the expert 'middle'" in capsys.readouterr().err
    assert cli.run(["bank", "fit-probe", str(scene / "bank"), "--data", data[1]]) == 0
    said = capsys.readouterr().out
    assert "middle: 10 frames" in said and "100.0% right on held-out frames" in said

    bank.add(scene / "bright")
    assert cli.run(["bank", "fit-probe", str(scene / "bank"), "--data", data[2]]) == 0
    router = make_task_router("probe", BankPolicy.load(scene / "bank"), RouterSettings(folder=scene / "bank"))
    for expert, (name, shade) in enumerate(SHADES.items()):
        decision = router.route(Observation(*shaded(shade, 9000), "find the light"))
        assert decision.expert == expert, name
    assert cli.run(["bank", "fit-probe", str(scene / "bank"), "--data", "brigt=x"]) == 2
    assert "Did you mean 'bright'" in capsys.readouterr().err
    assert cli.run(["bank", "fit-probe", str(scene / "base")]) == 2


def test_frames_are_spread_over_the_episodes(scene):
    dataset = open_demonstrations(scene / "dark-data")
    assert choose_frames(dataset, 1, 400).tolist() == [0, 6, 12, 18, 24]
    assert choose_frames(dataset, 2, 400).tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert choose_frames(dataset, 2, 4).tolist() == [0, 9, 18, 27]
    assert len(choose_frames(dataset, 50, 400)) == 30


def test_only_the_tasks_on_the_experts_card_count(scene, tmp_path, capsys):
    tasks = ("find the light", "find the dark")
    write_dataset(tmp_path / "both", 90, 7, episodes=12, tasks=tasks)
    save_tiny_expert(tmp_path / "light", scene / "base", 3, tasks[:1])
    BankFolder.create(tmp_path / "bank", scene / "base", [tmp_path / "light"])
    line = ["bank", "fit-probe", str(tmp_path / "bank"), "--data", f"light={tmp_path / 'both'}"]
    assert cli.run(line) == 0
    assert "light: 12 frames" in capsys.readouterr().out
    part = choose_tasks([open_demonstrations(tmp_path / "both")], tasks[:1])[0]
    assert choose_frames(part, 1, 400).tolist() == [0, 12, 24, 36, 48, 60]
