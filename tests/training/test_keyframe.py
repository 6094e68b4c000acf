import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.contract import ACTION_KEY, JOINT_POSITION, OSC_POSE_DELTA, STATE_KEY, Interface, Vector
from vla.training.keyframe import HandPlace, is_closed, next_keyframe


def test_worked_example():
    # Two episodes; the gripper closes at frame 2 and opens at frame 4, then closes at frame 7.
    gripper = np.array([-1, -1, 1, 1, -1, 1, 1, -1, 0.5])
    end = np.array([5] * 5 + [9] * 4)
    position = np.arange(9.0)[:, None] * [1, 10, 100]
    offset, is_pad = next_keyframe(position, gripper > 0, end)
    np.testing.assert_array_equal(offset[:, 0], [2, 1, 0, 1, 0, 2, 1, 0, 0])
    np.testing.assert_array_equal(offset[:, 2], 100 * offset[:, 0])
    # frame 8 flips from open to close, so nothing is padding; frame 5 starts an episode and is no event
    assert not is_pad.any()
    _, is_pad = next_keyframe(position[:5], np.zeros(5, bool), end[:5])
    assert is_pad.all()


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=12), min_size=1, max_size=4))
def test_equals_a_search_frame_by_frame(episodes):
    gripper = np.concatenate(episodes)
    ends = np.cumsum([len(episode) for episode in episodes])
    end = np.repeat(ends, [len(episode) for episode in episodes])
    start = np.repeat(np.r_[0, ends[:-1]], [len(episode) for episode in episodes])
    position = np.random.default_rng(0).normal(size=(len(gripper), 3))
    offset, is_pad = next_keyframe(position, gripper > 0, end)
    for now in range(len(gripper)):
        events = [
            t for t in range(max(now, start[now] + 1), end[now]) if (gripper[t] > 0) != (gripper[t - 1] > 0)
        ]
        assert is_pad[now] == (not events)
        expected = position[events[0]] - position[now] if events else np.zeros(3)
        np.testing.assert_allclose(offset[now], expected, rtol=1e-6)


ARM = ("shoulder_pan.pos", "elbow_flex.pos", "gripper.pos")


def interface(action_space, state=ARM, action=ARM, units=()):
    vector = None if state is None else Vector(STATE_KEY, state, units)
    return Interface((), vector, Vector(ACTION_KEY, action), action_space, 30.0)


def test_where_the_hand_is_follows_from_the_interface():
    eight = tuple(f"s{k}" for k in range(8))
    assert HandPlace.of(interface(OSC_POSE_DELTA, state=eight, action=eight[:7])) == HandPlace(3, 0.1)
    assert HandPlace.of(interface(JOINT_POSITION)) == HandPlace(2, 10.0)
    assert HandPlace.of(interface(JOINT_POSITION, units=("deg", "deg", "percent"))) == HandPlace(2, 10.0)
    assert HandPlace.of(interface(JOINT_POSITION, units=("rad", "rad", "percent"))) == HandPlace(2, 0.2)


@pytest.mark.parametrize(
    "unknown",
    [
        interface(JOINT_POSITION, state=None),
        interface(JOINT_POSITION, state=ARM[:2], action=ARM[:2]),
        interface(JOINT_POSITION, state=(*ARM, "current")),
        interface(None),
    ],
    ids=["no state", "no gripper", "state is not the joints", "no action space"],
)
def test_no_keyframes_where_that_is_not_known(unknown):
    assert HandPlace.of(unknown) is None


def test_a_joint_of_a_gripper_changes_side_at_the_middle_of_its_commands():
    commands = np.array([51.0, 51.0, 30.0, 20.0, 0.0, 51.0], np.float32)
    np.testing.assert_array_equal(is_closed(commands, JOINT_POSITION), [1, 1, 1, 0, 0, 1])
    np.testing.assert_array_equal(is_closed(np.array([-1.0, 1.0, 1.0, 0.2]), OSC_POSE_DELTA), [0, 1, 1, 1])
