"""`vla train` and lerobot-train give the same losses on the same batches, step by step."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.factory import make_dataset
from lerobot.datasets.sampler import EpisodeAwareSampler
from lerobot.optim.factory import make_optimizer_and_scheduler
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

from vla.training.dataset import open_demonstrations
from vla.training.loop import train
from vla.training.metrics import read_metrics
from vla.training.policy_setup import new_policy_config

STEPS = 5


def lerobot_train(config, root) -> list[dict[str, float]]:
    """The body of lerobot-train's loop, from LeRobot's own functions."""
    interface = open_demonstrations(root, action_space=config.action_space).interface
    policy_config = new_policy_config(config, interface, "cpu")
    pipeline = TrainPipelineConfig(
        dataset=DatasetConfig(repo_id=root.name, root=str(root), video_backend="pyav"),
        policy=policy_config,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    pipeline.optimizer = policy_config.get_optimizer_preset()
    pipeline.scheduler = policy_config.get_scheduler_preset()
    dataset = make_dataset(pipeline)
    torch.manual_seed(config.seed)
    policy = make_policy(policy_config, ds_meta=dataset.meta)
    preprocessor, _ = make_pre_post_processors(policy_config, dataset_stats=dataset.meta.stats)
    optimizer, scheduler = make_optimizer_and_scheduler(pipeline, policy)
    episodes = dataset.meta.episodes
    sampler = EpisodeAwareSampler(
        episodes["dataset_from_index"], episodes["dataset_to_index"], shuffle=True, seed=config.seed
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=config.batch_size, sampler=sampler)
    names = ("loss", "grad_norm", "lr", "update_s")
    rows = []
    for _, batch in zip(range(config.steps), loader, strict=False):
        tracker = MetricsTracker(1, 1, 1, {name: AverageMeter(name) for name in names})
        for key in dataset.meta.camera_keys:
            batch[key] = batch[key].to(torch.float32) / 255.0
        update_policy(
            tracker,
            policy,
            preprocessor(batch),
            optimizer,
            pipeline.optimizer.grad_clip_norm,
            Accelerator(cpu=True),
            scheduler,
        )
        rows.append({name: getattr(tracker, name).avg for name in names})
    return rows


def test_same_losses_as_lerobot_train(video_dataset, small_run):
    config = small_run(steps=STEPS, augment=False, ema_decay=0.0, held_out=0.0)
    config = dataclasses.replace(config, policy=(*config.policy, "keyframe=false"))
    expected = lerobot_train(config, video_dataset)
    train(config)
    actual = [row for row in read_metrics(config.out / "metrics.jsonl") if row["kind"] == "train"]
    assert len(expected) == len(actual) == STEPS
    for theirs, ours in zip(expected, actual, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
