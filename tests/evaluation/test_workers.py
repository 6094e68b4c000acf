"""Supervision of worker processes, with scripted policy and simulation."""

import multiprocessing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_rollout import ScriptedSimulation, ScriptedSource, Simulate, Trouble

from vla.contract import ContractError
from vla.errors import UserError
from vla.evaluation.plan import make_plan
from vla.evaluation.rollout import Request, RolloutJob, run_episode, run_episodes
from vla.evaluation.schedule import EpisodeQueue, scene_of
from vla.evaluation.workers import LocalWorkers, supervise

SOURCE = ScriptedSource()
HUNG = 25  # s: the retry starts a worker and imports, which a busy machine takes its time for


def small_plan(episodes_per_task=4, tasks="0,1", n_action_steps=8):
    return make_plan(
        suites=("libero_object",),
        tasks=tasks,
        init_states=None,
        episodes_per_task=episodes_per_task,
        seed=0,
        protocol="oft",
        max_steps=60,
        checkpoint_hash=SOURCE.hash,
        n_action_steps=n_action_steps,
        image_size=32,
    )


def run(plan, trouble=None, source=SOURCE, workers=2, timeout=60.0):
    job = RolloutJob(source, plan, Simulate(trouble or Trouble()))
    queue = EpisodeQueue(Request(episode) for episode in plan.episodes)
    outcomes = list(supervise(LocalWorkers(job, workers, timeout), queue, source.hash))
    assert not multiprocessing.active_children()
    return {outcome.record.episode: outcome.record for outcome in outcomes}


def results(records):
    return {episode: (record.status, record.steps, record.queries) for episode, record in records.items()}


def alone(plan):
    """Each episode by itself, in this process, in a fresh simulation."""
    job = RolloutJob(SOURCE, plan, Simulate())
    pairs = [next(run_episodes(job, [Request(episode)])).record for episode in plan.episodes]
    return results({record.episode: record for record in pairs})


def test_an_episode_gives_the_same_result_alone_and_in_any_batch():
    plan = small_plan()
    expected = alone(plan)
    assert len({outcome[:2] for outcome in expected.values()}) > 3  # the script is not trivial
    assert results(run(plan, workers=1)) == results(run(plan, workers=2)) == expected


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("kill", "died (signal 9, Killed)"),
        ("raise", "SimulationError: the physics became unstable (scripted_"),
    ],
)
def test_a_broken_episode_is_retried_once_and_says_so(tmp_path, kind, error):
    plan = small_plan(3)
    records = run(plan, Trouble(kind, init_state=1, times=1, notes=tmp_path))
    (retried,) = [record for record in records.values() if record.attempts == 2]
    assert retried.init_state == 1 and error in retried.errors[0]
    assert results(records) == alone(plan)


def test_an_episode_that_breaks_twice_is_an_error_and_no_failure_of_the_policy(tmp_path):
    records = run(small_plan(3, tasks="0"), Trouble("kill", init_state=1, times=9, notes=tmp_path))
    (broken,) = [record for record in records.values() if record.status == "error"]
    assert broken.init_state == 1 and broken.success is None and broken.attempts == len(broken.errors) == 2
    assert len(records) == 3


def test_a_hung_episode_is_stopped_and_retried(tmp_path):
    plan = small_plan(2, tasks="0")
    trouble = Trouble("hang", init_state=1, times=1, notes=tmp_path)
    records = run(plan, trouble, workers=1, timeout=HUNG)
    (retried,) = [record for record in records.values() if record.attempts == 2]
    assert f"no result within {HUNG} s" in retried.errors[0]
    assert results(records) == alone(plan)


def test_a_refusal_of_a_worker_is_the_users_sentence(tmp_path):
    with pytest.raises(UserError, match="The scripted simulator has no back-end"):
        run(small_plan(2), Trouble("refuse", init_state=0, times=9, notes=tmp_path))


def test_nothing_works_is_said_early(tmp_path):
    plan = small_plan(8, tasks="0")
    with pytest.raises(UserError, match=r"No episode can be run on this machine: ValueError.*not finite"):
        run(plan, source=ScriptedSource(bad_action=float("nan")))


def test_workers_keep_to_their_task(tmp_path):
    run(small_plan(4), Trouble("none", notes=tmp_path), workers=2)
    assert len(list(tmp_path.glob("worker-*"))) == 2


def test_no_more_workers_than_episodes(tmp_path):
    run(small_plan(1, tasks="0"), Trouble("none", notes=tmp_path), workers=4)
    assert len(list(tmp_path.glob("worker-*"))) == 1


def test_images_are_rendered_only_when_the_policy_looks():
    plan = small_plan(1, tasks="0", n_action_steps=5)
    job = RolloutJob(SOURCE, plan)
    simulation = ScriptedSimulation("libero_object", 0, 32, Trouble())
    outcome = run_episode(job, SOURCE.load(), simulation, Request(plan.episodes[0]))
    assert simulation.renders == outcome.record.queries == -(-outcome.record.steps // 5)


def test_a_film_changes_nothing_and_shows_every_step():
    import io

    import av

    plan = small_plan(1, tasks="0")
    job = RolloutJob(SOURCE, plan, Simulate())
    plain, filmed = (
        next(run_episodes(job, [Request(plan.episodes[0], video=video)])) for video in (False, True)
    )
    assert (plain.record.status, plain.record.steps) == (filmed.record.status, filmed.record.steps)
    with av.open(io.BytesIO(filmed.video)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 20 and (stream.height, stream.width) == (32, 64)
        assert sum(1 for _ in container.decode(video=0)) == filmed.record.steps + 1


def test_a_policy_of_another_interface_is_refused_before_the_first_step():
    job = RolloutJob(ScriptedSource(control_rate=30.0), small_plan(1), Simulate())
    with pytest.raises(ContractError, match="trained at 30 Hz but 20 Hz is offered"):
        next(run_episodes(job, [Request(job.plan.episodes[0])]))


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_queue_hands_out_everything_once_and_stays_with_a_task(tasks, workers, random):
    from vla.sim.episode import Episode

    requests = [Request(Episode("libero_object", task, i, i)) for i, task in enumerate(tasks)]
    queue, scenes, handed = EpisodeQueue(requests), [None] * workers, []
    while len(queue):
        worker = random.randrange(workers)
        waiting = {scene_of(request) for request in requests} - {None}
        left = [r for r in requests if r not in handed]
        request = queue.take(scenes[worker])
        if scenes[worker] in {scene_of(r) for r in left}:
            assert scene_of(request) == scenes[worker]
        assert scene_of(request) in waiting
        scenes[worker] = scene_of(request)
        handed.append(request)
    assert sorted(handed, key=lambda r: r.episode) == sorted(requests, key=lambda r: r.episode)
    assert queue.take() is None
