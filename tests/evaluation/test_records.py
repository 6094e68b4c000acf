import pytest
from scripted_rollout import ScriptedSimulation, ScriptedSource, Trouble

from vla.errors import UserError
from vla.evaluation.plan import make_plan
from vla.evaluation.records import EpisodeLog, read_records
from vla.evaluation.rollout import Request, RolloutJob, run_episodes
from vla.sim.episode import benchmark_episode

HASH = ScriptedSource().hash
EPISODES = [benchmark_episode("libero_object", 0, i) for i in range(4)]


def scripted(suite, task, image_size):
    return ScriptedSimulation(suite, task, image_size, Trouble())


@pytest.fixture(scope="module")
def records():
    plan = make_plan(
        suites=("libero_object",),
        tasks="0",
        init_states=None,
        episodes_per_task=4,
        seed=0,
        protocol="oft",
        max_steps=40,
        checkpoint_hash=HASH,
        n_action_steps=8,
        image_size=32,
    )
    job = RolloutJob(ScriptedSource(), plan, scripted)
    return [outcome.record for outcome in run_episodes(job, [Request(episode) for episode in EPISODES])]


def write(folder, records):
    with EpisodeLog(folder, EPISODES, HASH) as log:
        for record in records:
            log.append(record)
    return folder / "episodes.jsonl"


def test_rows_come_back(tmp_path, records):
    write(tmp_path, records)
    assert read_records(tmp_path) == records


def test_a_row_is_on_disk_as_soon_as_it_is_appended(tmp_path, records):
    with EpisodeLog(tmp_path, EPISODES, HASH) as log:
        log.append(records[0])
        assert read_records(tmp_path) == records[:1]


@pytest.mark.parametrize("lost", [1, 2, 50, 400])
def test_a_torn_last_line_is_dropped_and_the_file_goes_on_clean(tmp_path, records, lost):
    path = write(tmp_path, records[:3])
    path.write_bytes(path.read_bytes()[:-lost])
    with EpisodeLog(tmp_path, EPISODES, HASH) as log:
        assert log.records == records[:2]
        log.append(records[2])
    assert read_records(tmp_path) == records[:3]


def test_a_torn_multibyte_character_is_only_a_torn_line(tmp_path, records):
    path = write(tmp_path, records[:1])
    path.write_bytes(path.read_bytes() + '{"suite": "é'.encode()[:-1])
    assert read_records(tmp_path) == records[:1]


def test_a_damaged_line_in_the_middle_is_refused(tmp_path, records):
    path = write(tmp_path, records[:2])
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(UserError, match=r"episodes.jsonl:1 is damaged"):
        EpisodeLog(tmp_path, EPISODES, HASH)


def test_rows_of_another_checkpoint_are_refused(tmp_path, records):
    write(tmp_path, records[:1])
    with pytest.raises(UserError, match="another evaluation"):
        EpisodeLog(tmp_path, EPISODES, "0" * 64)


def test_rows_of_other_episodes_are_refused(tmp_path, records):
    write(tmp_path, records[:2])
    with pytest.raises(UserError, match="another evaluation"):
        EpisodeLog(tmp_path, EPISODES[:1], HASH)


def test_a_row_names_no_machine(records, tmp_path):
    import socket

    assert socket.gethostname() not in write(tmp_path, records).read_text()
