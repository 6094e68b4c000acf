"""The suite so101_tabletop: kinematics, episodes, the demonstrator, collection and evaluation."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.contract import ContractError, Interface, PolicyContract
from vla.errors import UserError
from vla.evaluation.plan import make_plan
from vla.evaluation.rollout import Request, RolloutJob, check_contract, run_episodes
from vla.robot_drivers import Mode, Supervisor
from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.emulation.tabletop import INSTRUCTION
from vla.robot_drivers.so101.driver import So101Driver
from vla.robot_drivers.so101.interface import NAMES, UNITS, from_policy, to_policy
from vla.sim import Episode, benchmark_episode, demonstration_seed, held_out_seed, sim_interface
from vla.sim.collection import CollectConfig, collect
from vla.sim.demonstrators.style import CLEAN, Style
from vla.sim.recording import Recording, render
from vla.sim.suites import load_suite
from vla.sim.tabletop.demonstrator import JointNoise, TabletopDemonstrator, demonstrate_tabletop
from vla.sim.tabletop.kinematics import Kinematics, pointing_down
from vla.sim.tabletop.simulation import TabletopSimulation, tabletop_interface

SUITE, SIZE = "so101_tabletop", 32
STEP = 360 / 4095  # degrees per step of an encoder, as LeRobot counts


def episode(index: int = 0) -> Episode:
    return Episode(SUITE, 0, None, held_out_seed(5, SUITE, 0, index))


@pytest.fixture(scope="module")
def sim():
    with TabletopSimulation(image_size=SIZE) as sim:
        yield sim


# ---------------------------------------------------------------------- units and kinematics


def test_lerobots_units():
    assert NAMES[0] == "shoulder_pan.pos" and NAMES[5] == "gripper.pos"
    assert UNITS == ("deg",) * 5 + ("percent",)
    assert to_policy([np.pi / 2, 0, 0, -np.pi, 0, 0.25]) == pytest.approx([90, 0, 0, -180, 0, 25])
    assert from_policy(np.array([180, 0, 0, 0, 0, 50.0])) == pytest.approx(
        {"shoulder_pan": np.pi, "shoulder_lift": 0, "elbow_flex": 0, "wrist_flex": 0, "wrist_roll": 0}
        | {"gripper": 0.5}
    )
    with pytest.raises(ValueError, match="6 joint positions"):
        from_policy(np.zeros(7))


@settings(max_examples=40)
@given(
    reach=st.floats(0.17, 0.26),
    bearing=st.floats(-0.8, 0.8),
    height=st.floats(0.015, 0.05),
    turn=st.floats(-0.75, 0.75),
)
def test_a_hand_that_points_down_reaches_the_whole_work_area(reach, bearing, height, turn):
    kinematics = Kinematics()
    position = np.array([0.0388 + reach * np.cos(bearing), reach * np.sin(bearing), height])
    q, error = kinematics.solve(position, pointing_down(bearing + turn), np.zeros(5), steps=200)
    reached, rotation = kinematics.pose(q)
    assert error < 1e-3 and np.linalg.norm(reached - position) < 1e-3
    assert rotation[2, 2] > np.cos(np.radians(4))  # at the far edge the wrist's limit lets it lean a little
    assert (np.abs(q) <= kinematics._model.jnt_range[:5, 1]).all()


def test_what_cannot_be_reached_says_how_far_off_it_is():
    _, error = Kinematics().solve(np.array([0.8, 0.0, 0.1]), pointing_down(0.0), np.zeros(5))
    assert error > 0.3


# ---------------------------------------------------------------------- episodes


def test_the_suite_and_its_interface(sim):
    suite = load_suite(SUITE)
    assert [task.language for task in suite.tasks] == [INSTRUCTION] and suite.step_limit("lerobot") == 375
    assert len(suite.init_states(0)) == 50
    interface = tabletop_interface(SIZE)
    assert [camera.key for camera in interface.cameras] == [
        "observation.images.top",
        "observation.images.wrist",
    ]
    assert interface.action_space == "joint_position" and interface.control_rate == 25
    sim.reset(episode())
    assert {name: image.shape for name, image in sim.images().items()} == {
        "top": (SIZE, SIZE, 3),
        "wrist": (SIZE, SIZE, 3),
    }
    assert sim.state().shape == (6,) and sim.state().dtype == np.float32


def test_demonstrations_and_evaluations_never_share_a_layout(sim):
    ours = {sim.table.layout(demonstration_seed(0, SUITE, 0, k)).cube for k in range(50)}
    theirs = {sim.table.layout(benchmark_episode(SUITE, 0, k).seed).cube for k in range(50)}
    held = {sim.table.layout(held_out_seed(0, SUITE, 0, k)).cube for k in range(50)}
    assert len(ours | theirs | held) == 150


def swing(sim, index: int) -> np.ndarray:
    """States of half a second of motion."""
    sim.reset(episode(index))
    start, states = sim.state().astype(float), []
    for k in range(12):
        sim.step(start + (k + 1) * np.array([2.0, 2.5, -2.0, -1.0, 1.0, 4.0]))
        states.append(sim.state())
    return np.array(states)


def test_an_episode_is_the_same_in_any_order(sim):
    first = swing(sim, 0)
    assert np.ptp(first, axis=0).min() > 8
    assert not np.array_equal(first, swing(sim, 1))
    assert np.array_equal(first, swing(sim, 0))
    with TabletopSimulation() as other:
        assert np.array_equal(first, swing(other, 0))


def test_the_state_is_what_an_encoder_can_tell(sim):
    sim.reset(episode())
    calibration = sim.table.calibration["shoulder_pan"]
    middle = (calibration.range_min + calibration.range_max) / 2
    steps = sim.state()[0] / STEP + middle
    assert steps == pytest.approx(round(steps), abs=1e-3)


def test_what_the_safety_filter_refuses_does_not_move_the_arm(sim):
    sim.reset(episode())
    before = sim.state()
    for _ in range(4):
        sim.step(np.full(6, np.nan))
    assert np.abs(sim.state() - before).max() < 3 * STEP
    for _ in range(40):
        sim.step(np.array([500.0, *before[1:]]))
    assert 100 < sim.state()[0] < 110  # the calibrated limit, less the filter's margin
    assert sim.supervisor.mode is Mode.TRACK
    with pytest.raises(ValueError, match="6 joint positions"):
        sim.step(np.zeros(7))


def test_episodes_of_elsewhere_are_refused(sim):
    with pytest.raises(UserError, match="is for libero_object task 0"):
        sim.reset(Episode("libero_object", 0, None, 3))
    with pytest.raises(UserError, match="not 'libero_goal'"):
        TabletopSimulation("libero_goal")
    with pytest.raises(UserError, match="has no task 1"):
        TabletopSimulation(SUITE, 1)


# ---------------------------------------------------------------------- the demonstrator


def test_the_demonstrator_succeeds_and_says_what_was_done(sim):
    rows = []
    done = demonstrate_tabletop(
        sim,
        episode(1),
        seed=3,
        style=Style(action_noise=0.4),
        record=lambda sim, clean, executed: rows.append((sim.sim_state(), sim.state(), clean, executed)),
    )
    assert done.success and done.reason == "success" and done.steps == len(rows) < 250
    cube, bowl = sim.table.cube_pose[0], sim.table.bowl_position
    assert np.linalg.norm(cube[:2] - bowl[:2]) < 0.03 and not sim.table.touching_hand
    clean, executed = (np.array([row[k] for row in rows]) for k in (2, 3))
    noisy = np.abs(clean - executed).max(axis=1) > 0
    assert 0.05 < noisy.mean() < 0.6
    assert np.array_equal(clean[:, 5], executed[:, 5]) and {0, 1} == set(np.round(clean[:, 5] / 51))
    lead = np.abs(clean[:, :5] - np.array([row[1][:5] for row in rows])).max()
    assert lead < np.degrees(0.13) + 2 * STEP  # never further ahead of the arm than it says


def test_a_demonstration_repeats_to_the_bit_and_ends_at_its_limit(sim):
    runs = [demonstrate_tabletop(sim, episode(2), seed=8, style=CLEAN) for _ in range(2)]
    assert runs[0].success and np.array_equal(runs[0].actions, runs[1].actions)
    short = demonstrate_tabletop(sim, episode(2), seed=8, style=CLEAN, step_limit=20)
    assert (short.success, short.steps, short.reason) == (False, 20, "step limit")


def test_a_demonstration_may_start_with_the_hand_elsewhere(sim):
    def first_state(seed, spread):
        rows = []
        style = replace(CLEAN, start_spread=spread)
        done = demonstrate_tabletop(
            sim, episode(2), seed=seed, style=style, record=lambda sim, *_: rows.append(sim.state())
        )
        assert done.success and done.steps == len(rows)
        return rows[0]

    home, there, elsewhere = first_state(1, 0.0), first_state(1, 0.05), first_state(2, 0.05)
    assert np.abs(there - home)[:5].max() > 10  # degrees: up from its rest pose
    assert 2 < np.abs(there - elsewhere)[:5].max() < 60
    assert np.array_equal(there, first_state(1, 0.05))


def test_a_lost_cube_is_picked_up_again(sim):
    sim.reset(episode(3))
    dropped = False
    for k, action in enumerate(TabletopDemonstrator(sim, seed=0, style=CLEAN).actions()):
        if not dropped and sim.table.touching_hand and sim.table.cube_pose[0][2] > 0.06:
            sim.table.arrange(sim.table.layout(episode(3).seed))  # out of the hand, back to its place
            dropped = True
        if sim.step(action) or k > 370:
            break
    assert dropped and sim.success


def test_an_arm_with_a_fault_ends_the_demonstration(sim):
    def overheat(sim, clean, executed):
        if len(seen) == 30:
            sim.table.servos[1].temperature = 90
        seen.append(clean)

    seen = []
    done = demonstrate_tabletop(sim, episode(), seed=0, style=CLEAN, record=overheat)
    assert not done.success and "overheating" in done.reason and 30 < done.steps < 40


def test_noise_comes_in_bursts_and_spares_the_gripper():
    noise = JointNoise(Style(action_noise=0.4), np.random.default_rng(0))
    clean = np.zeros(6)
    rows = np.array([noise(clean) for _ in range(2000)])
    assert (rows[:, 5] == 0).all()
    hit = rows[:, 0] != 0
    assert 0.1 < hit.mean() < 0.5 and rows[hit, :5].std() == pytest.approx(np.degrees(0.4 * 0.13), rel=0.2)
    assert np.array_equal(JointNoise(CLEAN, np.random.default_rng(0))(clean), clean)


def test_a_demonstration_runs_through_the_serial_port_as_it_was_recorded(sim):
    """The same setpoints, over a pseudo-terminal to another process: states, frames, success are equal."""
    rows = []

    def record(sim, clean, executed):
        rows.append((sim.state(), executed, sim.images() if len(rows) % 40 == 0 else None))

    done = demonstrate_tabletop(sim, episode(4), seed=2, style=CLEAN, record=record)
    assert done.success
    now = 0.0

    with Emulator(lockstep=sim.period, tabletop=episode(4).seed, cameras=(SIZE, SIZE)) as emulator:
        driver = So101Driver(emulator.port, emulator.calibration, clock=lambda: now, reply_timeout=10.0)
        supervisor = Supervisor(driver, np.array(driver.info.rest))
        supervisor.open()
        supervisor.enable(now)
        cameras = {name: emulator.camera(name) for name in ("top", "wrist")}
        settling = [(None, None, None)] * 10
        for state, action, frames in settling + rows:
            if state is not None:
                assert np.array_equal(to_policy(driver.read().q), state)
                supervisor.setpoint(from_policy(action), now, within=4 * sim.period)
            for name, frame in (frames or {}).items():
                assert np.array_equal(cameras[name].read(), frame)
            for _ in range(4):
                now += sim.period
                supervisor.cycle(now)
        driver.read()  # the last goal has arrived when this is answered
        assert emulator.look()["success"] is True
        for camera in cameras.values():
            camera.close()
        driver.close()


# ---------------------------------------------------------------------- collecting and evaluating


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tabletop") / "demo"
    collect(CollectConfig(suite=SUITE, out=out, workers=1, image_size=SIZE, episodes_per_task=2))
    return out


def test_a_collection_is_a_dataset_of_the_arm(dataset, sim):
    info = json.loads((dataset / "meta" / "info.json").read_text())
    assert Interface.from_dataset(info) == tabletop_interface(SIZE)
    assert info["robot_type"] == "so101_follower" and info["total_episodes"] == 2
    provenance = json.loads((dataset / "meta" / "cogmerge.json").read_text())
    assert set(provenance["versions"]) == {"mujoco", "lerobot_policy_cogmerge"}
    recording = Recording.load(dataset / "simulator" / "episode_000001.safetensors")
    assert recording.episode.seed == demonstration_seed(0, SUITE, 0, 1)
    drawn = list(render(recording, sim))
    assert len(drawn) == len(recording.executed) == len(recording.states)


def test_a_recorded_demonstration_replays_to_the_same_frames(dataset, sim):
    recording = Recording.load(dataset / "simulator" / "episode_000000.safetensors")
    again = render(recording, sim)
    with TabletopSimulation(image_size=SIZE) as live:
        live.reset(recording.episode)
        for action, frames in zip(recording.executed, again, strict=True):
            assert all(np.array_equal(live.images()[name], frame) for name, frame in frames.items())
            done = live.step(action)
        assert done


@dataclass(frozen=True)
class OpenLoop:
    """A policy that demonstrates an episode for itself, and then acts by heart, eyes closed."""

    label: str = "open loop"
    hash: str = "0" * 64
    manifest: tuple = ()

    @property
    def contract(self) -> PolicyContract:
        return PolicyContract(tabletop_interface(SIZE), 8, 8, {}, {})

    def load(self):
        return OpenLoopPolicy()


class OpenLoopPolicy:
    def reset(self, seed):
        with TabletopSimulation() as mind:
            known = Episode(SUITE, 0, None, seed)
            self.actions = list(demonstrate_tabletop(mind, known, seed=1, style=CLEAN).actions)

    def act(self, images, state, instruction):
        assert set(images) == {"top", "wrist"} and state.shape == (6,) and instruction == INSTRUCTION
        chunk, self.actions = self.actions[:8], self.actions[8:]
        return np.array((chunk + 8 * [self.last if not chunk else chunk[-1]])[:8])

    last = np.zeros(6)


def test_evaluation_runs_the_episodes_of_the_plan():
    source = OpenLoop()
    plan = make_plan(
        suites=(SUITE,), tasks=None, init_states="0-1", episodes_per_task=None, seed=0, protocol="oft",
        max_steps=None, checkpoint_hash=source.hash, n_action_steps=8, image_size=SIZE,
    )  # fmt: skip
    assert plan.step_limits == {SUITE: 375} and len(plan.episodes) == 2
    outcomes = list(run_episodes(RolloutJob(source, plan), [Request(it) for it in plan.episodes]))
    assert [outcome.record.success for outcome in outcomes] == [True, True]
    late = replace(plan, policy_delay=3)  # it stands still until the first answer, then does the same
    (outcome,) = run_episodes(RolloutJob(source, late), [Request(plan.episodes[0])])
    assert outcome.record.steps >= outcomes[0].record.steps


def test_a_checkpoint_of_another_world_is_refused():
    contract = PolicyContract(sim_interface(SIZE), 8, 8, {}, {})
    with pytest.raises(ContractError, match="the SO101 tabletop simulator: camera 'observation"):
        check_contract(contract, [SUITE])
    with pytest.raises(ContractError, match="the LIBERO simulator"):
        check_contract(OpenLoop().contract, ["libero_object"])


@pytest.mark.slow  # LeRobot, torch, and a policy
def test_nano_trains_on_a_collection_and_is_evaluated(dataset, tmp_path):
    from vla.evaluation.run import EvalConfig, evaluate
    from vla.training.loop import TrainConfig, train

    config = TrainConfig(
        out=tmp_path / "run", dataset=(dataset,), steps=24, batch_size=8, num_threads=1, log_every=12,
        policy=("chunk_size=8",), held_out=0.0, precision="float32",
    )  # fmt: skip
    train(config)
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in losses if "loss" in row]
    assert losses[-1] < losses[0]
    evaluate(
        EvalConfig(
            checkpoint=tmp_path / "run",
            suite=(SUITE,),
            out=tmp_path / "eval",
            episodes_per_task=2,
            max_steps=16,
            workers=1,
        )
    )
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["total"]["episodes"] == 2 and summary["total"]["errors"] == 0


def test_gymnasium_accepts_the_environment():
    import gymnasium
    from gymnasium.utils.env_checker import check_env

    environment = gymnasium.make(
        "vla.sim.tabletop.environment:cogmerge/so101_tabletop-v0", image_size=SIZE
    ).unwrapped
    check_env(environment, skip_render_check=True)
    observation, info = environment.reset(seed=53)
    assert info["episode"] == benchmark_episode(SUITE, 0, 3) and environment.observation_space.contains(
        observation
    )
    stay = observation["agent_pos"]
    environment._max_episode_steps = 2
    assert environment.step(stay)[1:4] == (0.0, False, False)
    assert environment.step(stay)[1:4] == (0.0, False, True)
    assert np.array_equal(environment.render(), environment.simulation.images()["top"])
    environment.close()
