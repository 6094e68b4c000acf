import json
from dataclasses import replace

import pytest
from scripted_rollout import ScriptedSource, Simulate

from vla.errors import UserError
from vla.evaluation.compare import CompareConfig, Comparison, compare, compare_folders
from vla.evaluation.plan import make_plan
from vla.evaluation.records import EpisodeLog
from vla.evaluation.rollout import Request, RolloutJob, run_episodes


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    """Folders of a weak and a strong policy over the same 30 episodes, and of a third over fewer."""

    def evaluate(name, skill, episodes, lose=0, break_first=False):
        folder = tmp_path_factory.mktemp(name)
        source = ScriptedSource(skill)
        plan = make_plan(
            suites=("libero_object",),
            tasks="0,1",
            init_states=None,
            episodes_per_task=episodes,
            seed=0,
            protocol="oft",
            max_steps=60,
            checkpoint_hash=source.hash,
            n_action_steps=8,
            image_size=32,
        )
        plan.save(folder)
        job = RolloutJob(source, plan, Simulate())
        with EpisodeLog(folder, plan.episodes, source.hash) as log:
            for i, outcome in enumerate(run_episodes(job, map(Request, plan.episodes[lose:]))):
                broken = break_first and i == 0
                record = outcome.record
                log.append(replace(record, status="error", success=None) if broken else record)
        return folder

    return {
        "weak": evaluate("weak", 0.3, 15),
        "strong": evaluate("strong", 0.6, 15),
        "short": evaluate("short", 0.6, 10),
        "unfinished": evaluate("unfinished", 0.6, 15, lose=3),
        "broken": evaluate("broken", 0.6, 15, break_first=True),
    }


def test_a_stronger_policy_wins_by_the_paired_counts(evaluations):
    *tasks, total = compare_folders(evaluations["weak"], evaluations["strong"])
    assert [row.pairs for row in (*tasks, total)] == [15, 15, 30]
    assert total.only_first == 0 and total.only_second >= 6
    assert total.only_second == sum(row.only_second for row in tasks)
    assert total.difference == pytest.approx(total.only_second / 30)
    assert total.p_value == pytest.approx(2 / 2**total.only_second)
    low, high = total.interval
    assert 0 < low < total.difference < high


def test_the_order_turns_the_sign(evaluations):
    forth = compare_folders(evaluations["weak"], evaluations["strong"])[-1]
    back = compare_folders(evaluations["strong"], evaluations["weak"])[-1]
    assert back.difference == -forth.difference and back.p_value == forth.p_value
    assert back.interval == pytest.approx((-forth.interval[1], -forth.interval[0]))


def test_a_policy_equals_itself(evaluations):
    total = compare_folders(evaluations["weak"], evaluations["weak"])[-1]
    assert total.difference == 0 and total.p_value == 1


def test_different_plans_are_refused(evaluations):
    with pytest.raises(UserError, match="plans differ: 30 episodes against 20, of which 20 are the same"):
        compare_folders(evaluations["weak"], evaluations["short"])


def test_an_unfinished_evaluation_is_refused(evaluations):
    with pytest.raises(UserError, match="not finished: 3 of 30 episodes have no result"):
        compare_folders(evaluations["weak"], evaluations["unfinished"])


def test_a_folder_that_is_no_evaluation_is_refused(evaluations, tmp_path):
    with pytest.raises(UserError, match="not an evaluation folder"):
        compare_folders(evaluations["weak"], tmp_path)


def test_pairs_with_an_error_are_left_out_and_counted(evaluations, capsys):
    total = compare_folders(evaluations["weak"], evaluations["broken"])[-1]
    assert (total.pairs, total.dropped) == (29, 1)
    compare(CompareConfig(evaluations["weak"], evaluations["broken"]))
    assert "1 pairs are left out" in capsys.readouterr().out


def test_the_table_and_the_file_say_the_same(evaluations, tmp_path, capsys):
    compare(CompareConfig(evaluations["weak"], evaluations["strong"], json=tmp_path / "paired.json"))
    written = json.loads((tmp_path / "paired.json").read_text())
    printed = capsys.readouterr().out
    assert [row["name"] for row in written][-1] == "total"
    assert f"{100 * written[-1]['difference']:+.1f}" in printed


def test_without_pairs_nothing_is_known():
    row = Comparison("empty", 0, 0, 0, 0, 2)
    assert row.difference is None and row.interval == (-1, 1) and row.p_value == 1
