import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vla.training.keyframe import next_keyframe


def test_worked_example():
    # Two episodes; the gripper closes at frame 2 and opens at frame 4, then closes at frame 7.
    gripper = np.array([-1, -1, 1, 1, -1, 1, 1, -1, 0.5])
    end = np.array([5] * 5 + [9] * 4)
    position = np.arange(9.0)[:, None] * [1, 10, 100]
    offset, is_pad = next_keyframe(position, gripper, end)
    np.testing.assert_array_equal(offset[:, 0], [2, 1, 0, 1, 0, 2, 1, 0, 0])
    np.testing.assert_array_equal(offset[:, 2], 100 * offset[:, 0])
    # frame 8 flips from open to close, so nothing is padding; frame 5 starts an episode and is no event
    assert not is_pad.any()
    _, is_pad = next_keyframe(position[:5], -np.abs(gripper[:5]), end[:5])
    assert is_pad.all()


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=12), min_size=1, max_size=4))
def test_equals_a_search_frame_by_frame(episodes):
    gripper = np.concatenate(episodes)
    ends = np.cumsum([len(episode) for episode in episodes])
    end = np.repeat(ends, [len(episode) for episode in episodes])
    start = np.repeat(np.r_[0, ends[:-1]], [len(episode) for episode in episodes])
    position = np.random.default_rng(0).normal(size=(len(gripper), 3))
    offset, is_pad = next_keyframe(position, gripper, end)
    for now in range(len(gripper)):
        events = [
            t for t in range(max(now, start[now] + 1), end[now]) if (gripper[t] > 0) != (gripper[t - 1] > 0)
        ]
        assert is_pad[now] == (not events)
        expected = position[events[0]] - position[now] if events else np.zeros(3)
        np.testing.assert_allclose(offset[now], expected, rtol=1e-6)
