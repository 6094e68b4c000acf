import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.policy.images import resize_area


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_whole_blocks_give_what_the_area_mode_gives_bit_for_bit(size, down, across, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, size * down, size * across)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    expected = F.interpolate(images.float(), (size, size), mode="area").round().to(torch.uint8)
    assert torch.equal(resize_area(images, size), expected)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(resize_area(channels_last, size), expected)
    assert torch.equal(resize_area(images[None], size), expected[None])


@pytest.mark.parametrize("pixels", [[0, 0, 0, 2], [1, 1, 1, 3], [255, 255, 255, 253]])
def test_a_mean_of_one_half_goes_to_the_even_neighbour(pixels):
    image = torch.tensor(pixels, dtype=torch.uint8).reshape(1, 2, 2).expand(3, 2, 2)
    half = sum(pixels) / 4
    assert half % 1 == 0.5
    assert resize_area(image, 1).flatten().tolist() == [round(half)] * 3
