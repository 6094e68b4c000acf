import time

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from vla.training.augmentation import AugmentationConfig, augment, color_jitter, random_shift

OFF = AugmentationConfig(shift=0, brightness=0, contrast=0, saturation=0, color=0)


def frames(batch=5, size=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_switched_off_it_changes_nothing():
    images = frames()
    result = augment(images, OFF, generator())
    assert result.shape == (5, 3, 24, 24)
    np.testing.assert_array_equal(result.permute(0, 2, 3, 1), images)


def test_shift_moves_the_image_and_repeats_the_border():
    images = frames(batch=40)
    shifted = random_shift(images, 3, generator())
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    seen = set()
    for before, after in zip(padded, shifted, strict=True):
        found = [
            (dy, dx)
            for dy in range(7)
            for dx in range(7)
            if np.array_equal(before[dy : dy + 24, dx : dx + 24], after)
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 20  # drawn per sample


@pytest.mark.parametrize(
    ("field", "apply"),
    [
        ("brightness", reference.adjust_brightness),
        ("saturation", reference.adjust_saturation),
    ],
)
def test_one_jitter_equals_torchvision_at_the_drawn_factor(field, apply):
    images = torch.from_numpy(frames(batch=3))
    config = AugmentationConfig(**{"brightness": 0, "contrast": 0, "saturation": 0, "color": 0, field: 0.5})
    column = ("brightness", "contrast", "saturation").index(field)
    factors = 1 + 0.5 * (torch.rand(3, 6, generator=generator(4)) * 2 - 1)[:, column]
    result = color_jitter(images, config, generator(4))
    for image, after, factor in zip(images, result, factors, strict=True):
        expected = apply(image.permute(2, 0, 1).float() / 255, float(factor)).permute(1, 2, 0) * 255
        assert (after.float() - expected).abs().max() < 1.0  # rounding, and torchvision's 0.2989 for 0.299


def test_contrast_keeps_the_mean_grey():
    image = torch.full((1, 16, 16, 3), 100, dtype=torch.uint8)
    image[:, ::2] = 140
    image[:, ::4] = 100  # rows 0, 4, ... are the ones the mean is taken over
    config = AugmentationConfig(brightness=0, contrast=0.5, saturation=0, color=0)
    factor = 1 + 0.5 * (torch.rand(1, 6, generator=generator(1)) * 2 - 1)[0, 1]
    after = color_jitter(image, config, generator(1)).float()
    torch.testing.assert_close(after, 100 + factor * (image.float() - 100), atol=0.51, rtol=0)


def test_values_saturate_instead_of_wrapping():
    white = torch.full((8, 16, 16, 3), 255, dtype=torch.uint8)
    config = AugmentationConfig(shift=0, brightness=0.5, contrast=0, saturation=0, color=0)
    assert color_jitter(white, config, generator()).float().min() >= 127


@pytest.mark.slow
def test_batch_of_64_costs_a_fraction_of_a_training_step():
    images = frames(batch=64, size=128)
    augment(images, AugmentationConfig(), generator())
    begin = time.process_time()
    for _ in range(5):
        augment(images, AugmentationConfig(), generator())
    assert (time.process_time() - begin) / 5 < 0.06  # a nano step takes about 0.5 CPU seconds
