"""The fast control step against robosuite's own ``env.step``, bit for bit."""

import json

import numpy as np
import pytest

from vla.sim import benchmark_episode, fast_step

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


def contact_rich_actions(steps: int, seed: int) -> np.ndarray:
    """Press down, sweep sideways and turn, opening and closing the gripper."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (-(-steps // 6), 7)).repeat(6, axis=0)[:steps]
    actions[:, 2] = np.where(np.arange(steps) % 24 < 18, -1.0, 0.5)
    return actions


def physics(sim) -> np.ndarray:
    """Full simulator state and controller, without the observation (compared by `proprioception`)."""
    return sim.sim_state()[: -sim._observed.pack().size]


def proprioception(sim) -> np.ndarray:
    seen = sim._observed
    return np.concatenate([seen.eef_position, seen.eef_quaternion, seen.fingers])


def assert_identical(sim, suite, task, steps):
    actions, contacts, reference = contact_rich_actions(steps, task), 0, []
    sim.reset(benchmark_episode(suite, task, 1), settle_steps=0)
    for action in actions:
        _, _, success, _ = sim.env.step(action)  # robosuite's own loop, with its three forward passes
        reference.append((physics(sim), proprioception(sim), bool(success)))
        contacts += sim.env.sim.data.ncon
    assert sim._step_domain != sim._plain_step, "the fast step is not in use"
    sim.reset(benchmark_episode(suite, task, 1), settle_steps=0)
    for step, (action, expected) in enumerate(zip(actions, reference, strict=True)):
        success = sim.step(action)
        assert np.array_equal(physics(sim), expected[0]), f"state differs at step {step}"
        assert np.array_equal(proprioception(sim), expected[1]), f"proprioception differs at step {step}"
        assert success == expected[2]
    assert contacts > 5 * steps


@pytest.mark.parametrize("suite", SUITES)
def test_identical_to_env_step_over_contacts(simulation_factory, suite):
    task = {"libero_spatial": 4, "libero_goal": 7}.get(suite, 0)
    assert_identical(simulation_factory(suite, task, image_size=64), suite, task, steps=60)


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("task", range(10))
def test_identical_to_env_step_on_every_task(simulation_factory, suite, task):
    assert_identical(simulation_factory(suite, task, image_size=64), suite, task, steps=160)


def rolled_out(drift: float):
    """A roll-out whose states differ by `drift` between the two kinds of step, and its call count."""
    calls = []

    def roll_out(step, actions):
        calls.append(step)
        return np.zeros((len(actions), 3)) + (drift if step == "fast" else 0.0)

    return roll_out, calls


def test_the_self_check_switches_off_with_a_message_and_remembers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    roll_out, calls = rolled_out(drift=1e-13)
    for _ in range(2):
        with pytest.warns(UserWarning, match="differs from robosuite's on this machine .*mujoco"):
            assert not fast_step.is_identical_here("fast", "plain", roll_out)
    assert calls == ["fast", "plain"]  # the second verdict came from the cache


def test_the_self_check_runs_once_per_set_of_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    roll_out, calls = rolled_out(drift=0.0)
    assert fast_step.is_identical_here("fast", "plain", roll_out)
    assert fast_step.is_identical_here("fast", "plain", roll_out)
    assert len(calls) == 2
    (verdict,) = json.loads((tmp_path / "cogmerge" / "fast_step.json").read_text()).items()
    assert "mujoco" in verdict[0] and "numpy" in verdict[0] and verdict[1] is True

    monkeypatch.setattr(fast_step, "version", lambda package: "99")
    assert fast_step.is_identical_here("fast", "plain", roll_out)
    assert len(calls) == 4


def test_a_damaged_cache_only_means_checking_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "cogmerge").mkdir()
    (tmp_path / "cogmerge" / "fast_step.json").write_text('{"half')
    roll_out, calls = rolled_out(drift=0.0)
    assert fast_step.is_identical_here("fast", "plain", roll_out) and len(calls) == 2


def test_a_simulation_falls_back_to_the_plain_step(simulation_factory, monkeypatch):
    sim = simulation_factory("libero_object", 0, image_size=64)
    monkeypatch.setattr(fast_step, "is_identical_here", lambda *_: False)
    monkeypatch.setattr(sim, "_step_domain", sim._plain_step)
    sim._use_fast_step()
    assert sim._step_domain == sim._plain_step
    sim.reset(benchmark_episode("libero_object", 0, 0))
    assert not sim.step(np.zeros(7))
