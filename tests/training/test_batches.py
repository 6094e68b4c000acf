import dataclasses

import numpy as np
import pytest
import torch
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.sampler import EpisodeAwareSampler

from vla.contract import JOINT_POSITION, OSC_POSE_DELTA, Vector
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.training.augmentation import AugmentationConfig
from vla.training.batches import BatchSource
from vla.training.dataset import open_demonstrations
from vla.training.frame_cache import LiveFrames
from vla.training.sampler import EpochSampler, held_out_episodes


def source(*roots, size=64, offsets=range(8), action_space=OSC_POSE_DELTA):
    datasets = [open_demonstrations(root, action_space=action_space) for root in roots]
    return BatchSource(datasets, [LiveFrames(dataset, size) for dataset in datasets], offsets)


def test_samples_equal_those_of_lerobot(video_dataset):
    meta = LeRobotDatasetMetadata(video_dataset.name, root=video_dataset)
    deltas = resolve_delta_timestamps(CogMergeConfig(device="cpu"), meta)
    lerobot = LeRobotDataset(
        video_dataset.name,
        root=video_dataset,
        delta_timestamps=deltas,
        return_uint8=True,
        video_backend="pyav",
    )
    ours = source(video_dataset)
    assert len(ours) == len(lerobot)
    for first in range(0, len(lerobot), 8):
        frames = np.arange(first, min(first + 8, len(lerobot)))
        batch = ours.batch(frames)
        for row, frame in enumerate(frames.tolist()):
            item = lerobot[frame]
            assert batch["task"][row] == item["task"]
            for key in ("action", "action_is_pad", "observation.state", *meta.camera_keys):
                assert batch[key].dtype == item[key].dtype
                assert torch.equal(batch[key][row], item[key]), (key, frame)


def test_action_offsets_may_reach_into_the_past(video_dataset):
    batch = source(video_dataset, offsets=(-1, 0, 1)).batch(np.array([0, 5, 12]))
    np.testing.assert_array_equal(
        batch["action_is_pad"], [[True, False, False], [False] * 3, [True, False, False]]
    )
    assert torch.equal(batch["action"][0, 0], batch["action"][0, 1])


def test_image_dataset_with_other_cameras(image_dataset):
    batch = source(image_dataset, size=16, action_space=JOINT_POSITION).batch(np.array([3, 70]))
    assert batch["observation.images.front"].shape == (2, 3, 16, 16)
    assert "keyframe" not in batch  # nothing is called a gripper


def test_joint_datasets_aim_at_the_joints_of_the_next_gripper_event(video_dataset):
    """The first seven entries of the state stand for joints here; the gripper changes halfway."""
    dataset = open_demonstrations(video_dataset, action_space=JOINT_POSITION)
    names = (*(f"joint_{k}.pos" for k in range(6)), "gripper.pos")
    vectors = {
        "state": Vector("observation.state", names, ("deg",) * 6 + ("percent",)),
        "action": Vector("action", names),
    }
    interface = dataclasses.replace(dataset.interface, **vectors)
    arm = dataclasses.replace(dataset, interface=interface, state=dataset.state[:, :7])
    batch = BatchSource([arm], [LiveFrames(dataset, 16)], range(2)).batch(np.array([2, 7]))
    event = 6  # of the first episode's twelve frames
    torch.testing.assert_close(
        batch["keyframe"][0], torch.from_numpy(arm.state[event, :6] - arm.state[2, :6]), rtol=0, atol=0
    )
    assert batch["keyframe_is_pad"].tolist() == [False, True]


def test_mixed_datasets_are_numbered_one_after_the_other(video_dataset, tmp_path):
    single, double = source(video_dataset), source(video_dataset, video_dataset)
    n = len(single)
    assert len(double) == 2 * n
    frames = np.array([3, n - 1, 0])
    expected, mixed = single.batch(frames), double.batch(frames + np.array([n, 0, n]))
    for key, value in expected.items():
        assert value == mixed[key] if key == "task" else torch.equal(value, mixed[key]), key


def test_same_generator_seed_gives_the_same_augmented_batch(video_dataset):
    ours, frames = source(video_dataset), np.array([1, 2, 3])

    def draw(seed):
        return ours.batch(frames, AugmentationConfig(), torch.Generator().manual_seed(seed))

    key = "observation.images.image"
    assert torch.equal(draw(1)[key], draw(1)[key])
    assert not torch.equal(draw(1)[key], draw(2)[key])


def test_order_is_that_of_lerobots_sampler():
    lerobot = EpisodeAwareSampler([0, 10, 30], [10, 30, 37], [0, 2], shuffle=True, seed=5)
    kept = np.r_[np.arange(10), np.arange(30, 37)]
    ours = EpochSampler((kept,), seed=5)
    for epoch in range(3):
        assert list(lerobot) == ours.take(epoch * 17, 17).tolist()


@pytest.mark.parametrize("weights", [None, (1, 3)])
def test_stream_is_a_pure_function_of_position(weights):
    def sampler():
        return EpochSampler((np.arange(10), np.arange(10, 25)), seed=1, weights=weights)

    whole = sampler().take(0, 120)
    pieces = np.concatenate([sampler().take(start, 7) for start in range(0, 119, 7)])
    np.testing.assert_array_equal(whole[: len(pieces)], pieces[:120])


def test_weights_set_the_shares_and_every_frame_comes_round():
    sampler = EpochSampler((np.arange(10), np.arange(10, 50)), seed=1, weights=(1, 1))
    drawn = sampler.take(0, 20 * sampler.epoch_length)
    assert (drawn < 10).mean() == pytest.approx(0.5)
    counts = np.bincount(drawn, minlength=50)
    assert counts[:10].min() == counts[:10].max()
    assert np.ptp(counts[10:]) <= 1


def test_held_out_episodes_are_chosen_per_task():
    episode = np.repeat(np.arange(40), 3)
    task = np.repeat(np.arange(40) % 2, 3)
    chosen = held_out_episodes(episode, task, 0.1, seed=3)
    assert sorted(chosen % 2) == [0, 0, 1, 1]
    np.testing.assert_array_equal(chosen, held_out_episodes(episode, task, 0.1, seed=3))
    assert len(held_out_episodes(episode, task, 0.04, seed=3)) == 0  # too few episodes to spare one
