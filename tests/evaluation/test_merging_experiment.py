"""`scripts/experiment_merging`: what it runs and resumes, the recipes that it writes, and its table."""

import json
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_skills import save_tiny_base, save_tiny_expert

from vla.errors import UserError
from vla.evaluation.plan import make_plan
from vla.evaluation.records import EpisodeLog, EpisodeRecord
from vla.experts.merge import merge
from vla.experts.recipe import load_recipe
from vla.sim.suites import load_suite

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS / "experiments"))

import merging_recipes  # noqa: E402
import merging_table  # noqa: E402

SKILLS = ("soup=libero_object:0", "stove=libero_goal:7")


# --- the driver, with a `vla` that only notes what it was asked for -----------------------------------

FAKE_VLA = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$NOTES"
if [[ -n "${BREAK:-}" && " $* " == *" $BREAK "* ]]; then
    mkdir -p "$BREAK"; touch "$BREAK/train.json"; exit 130
fi
if [[ "$1" == collect ]]; then while [[ "$1" != --out ]]; do shift; done; mkdir -p "$2"; fi
if [[ "$1" == train ]]; then mkdir -p "$3"; touch "$3/train.json"; fi
if [[ "$1" == merge ]]; then mkdir -p "$4"; touch "$4/merge.json"; fi
if [[ "$1 $2" == "bank create" ]]; then mkdir -p "$3/task_router"; touch "$3/bank.json"; fi
if [[ "$1 $2" == "bank fit-probe" ]]; then touch "$3/task_router/probe.safetensors"; fi
if [[ "$1" == eval ]]; then
    while [[ "$1" != --out ]]; do [[ "$1" != --task-router ]] || router="$2"; shift; done
    mkdir -p "$2"; [[ -z "${router:-}" ]] || mkdir -p "$2/$router" "$2/oracle"
fi
exit 0
"""
FAKE_PYTHON = f"""#!/usr/bin/env bash
case "$1" in
    *merging_recipes.py) mkdir -p "$2"; touch "$2"/{{naive,ties,ties+masks}}.yaml ;;
    *merging_table.py) echo "table of ${{@:4}}" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def driver(tmp_path):
    """Run the script in a folder whose set-up gives it the fakes; return the process and the notes."""
    root = tmp_path / "root"
    (root / "scripts").mkdir(parents=True)
    (root / "venv" / "bin").mkdir(parents=True)
    script = root / "scripts" / "experiment_merging"
    script.write_text((SCRIPTS / "experiment_merging").read_text())
    (root / "scripts" / "experiments").mkdir()
    (root / "scripts" / "setup.sh").write_text(
        'set -euo pipefail\nVENV="' + str(root / "venv") + '"\n'
        'say() { echo "==> $*"; }\ndie() { echo "$*" >&2; exit 2; }\n'
    )
    for name, text in (("vla", FAKE_VLA), ("python", FAKE_PYTHON)):
        (root / "venv" / "bin" / name).write_text(text)
        (root / "venv" / "bin" / name).chmod(0o755)
    notes = tmp_path / "notes"

    def run(*stages, **settings):
        notes.write_text("")
        given = {"SKILLS": " ".join(SKILLS), "METHODS": "ties", "NOTES": str(notes)} | settings
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | given
        done = subprocess.run(
            ["bash", str(script), str(tmp_path / "out"), *stages],
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done, notes.read_text().splitlines()

    return run


def option(line, name):
    return line.split(f" {name} ", 1)[1].split(" --", 1)[0]


def test_the_whole_experiment_once_and_never_again(driver, tmp_path):
    (tmp_path / "given").mkdir()
    done, lines = driver(DATA=f"libero_goal={tmp_path / 'given'}", EXPERT="--lora.rank 4")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    soup, stove = (
        load_suite(suite).task(task).language for suite, task in (("libero_object", 0), ("libero_goal", 7))
    )
    collect, base, *experts, full, lora = lines[:6]
    assert collect.startswith("collect --suite libero_object") and (out / "data/libero_goal").is_symlink()
    assert option(base, "--without-tasks") == f"{soup} {stove}"
    assert [option(line, "--tasks") for line in experts] == [soup, stove]
    for line in (*experts, lora):
        assert " --lora.rank 4" in line
        assert option(line, "--base") == f"{out}/base"
    assert option(full, "--init-from") == f"{out}/base" and "--expert" not in full
    assert option(full, "--dataset-weights") == "1 1" and option(full, "--tasks") == f"{soup} {stove}"
    assert [option(line, "--steps") for line in (base, *experts, full)] == ["4000", "600", "600", "1200"]
    merges = [line for line in lines if line.startswith("merge")]
    assert {line.rsplit("/", 1)[1] for line in merges} == {"naive", "ties", "ties+masks"}
    evaluations = {
        Path(option(line + " --", "--out")).name: line for line in lines if line.startswith("eval")
    }
    names = [
        "expert-soup",
        "expert-stove",
        "base",
        "bank",
        "naive",
        "ties",
        "ties+masks",
        "joint-full",
        "joint-lora",
    ]
    assert list(evaluations) == names
    assert option(evaluations["expert-stove"], "--tasks") == "libero_goal:7"
    assert option(evaluations["ties"], "--tasks") == "libero_object:0 libero_goal:7"
    assert option(evaluations["ties"], "--suite") == "libero_object libero_goal"
    assert evaluations["naive"].endswith("--task-router none")
    routed = [line for line in lines if "eval/bank" in line]
    assert [option(line, "--task-router") for line in routed] == ["language", "probe", "value_subspace"]
    assert [line.endswith("--resume") for line in routed] == [False, True, True], "they share the oracle"
    assert f"table of {' '.join(SKILLS)}" in done.stdout
    assert (out / "commands.txt").read_text().count("\n") == len(lines)
    again, lines = driver(SKILLS=None, METHODS="ties")
    assert again.returncode == 0 and lines == [], "settings are remembered and nothing is run twice"


def test_two_skills_of_a_suite_share_its_demonstrations_and_episodes(driver):
    skills = "bowl=libero_goal:4,8 fixture=libero_goal:0,7 soup=libero_object:0"
    stages = ("data", "base", "experts", "joint", "evaluate")
    done, lines = driver(*stages, SKILLS=skills, METHODS="", ROUTERS="")
    assert done.returncode == 0, done.stderr
    collected = [option(line + " --", "--suite") for line in lines if line.startswith("collect")]
    assert collected == ["libero_goal", "libero_object"]
    joint = next(line for line in lines if "joint/full" in line)
    assert option(joint, "--dataset-weights") == "2 1", "every skill gets as many samples as its expert had"
    everything = next(line for line in lines if "eval/naive" in line)
    assert option(everything, "--tasks") == "libero_goal:4,8,0,7 libero_object:0"
    assert option(everything, "--suite") == "libero_goal libero_object"


def test_an_interrupted_step_is_resumed_and_only_that(driver, tmp_path):
    broken = tmp_path / "out/experts/stove"
    done, lines = driver("data", "base", "experts", "joint", BREAK=str(broken))
    assert done.returncode == 130 and str(broken) in lines[-1]
    done, lines = driver("data", "base", "experts", "joint")
    assert done.returncode == 0, done.stderr
    assert lines[0].endswith("--resume") and str(broken) in lines[0]
    assert len(lines) == 3 and not any("--resume" in line for line in lines[1:])
    commands = (tmp_path / "out/commands.txt").read_text().splitlines()
    assert len(commands) == len(set(commands)) == 7 and not any("--resume" in line for line in commands)


@pytest.mark.parametrize(
    ("stages", "settings", "sentence"),
    [
        (["bases"], {}, "There is no stage 'bases'"),
        (["data"], {"SKILLS": "soup"}, "'soup' in SKILLS is malformed; write NAME=SUITE:TASKS"),
        (["data"], {"SKILLS": "a=libero_goat:1"}, "Did you mean 'libero_goal'"),
        (
            ["data"],
            {"SKILLS": "a=libero_goal:1,3 b=libero_goal:2-4"},
            "SKILLS gives task 3 of libero_goal to a and to b",
        ),
        (
            ["data"],
            {"DATA": "libero_goal=/nowhere"},
            "DATA names /nowhere for libero_goal, which is no folder",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(driver, stages, settings, sentence):
    done, lines = driver(*stages, **settings)
    assert done.returncode != 0 and sentence in done.stderr
    assert lines == []
    assert driver("joint")[0].returncode == 0, "the folder is not bound to a mistake"


def test_a_folder_holds_one_experiment(driver):
    assert driver("data", EPISODES="2")[0].returncode == 0
    done, lines = driver("base", EPISODES="3")
    assert done.returncode == 2 and "was begun with EPISODES=2, not 3" in done.stderr
    assert lines == []


# --- the recipes --------------------------------------------------------------------------------------


def test_globs_match_what_they_stand_for_and_nothing_else():
    names = ["model.layers.0.film.weight", "model.layers.1.film.weight", "model.out.2.bias"]
    globs = merging_recipes.globs_of(names, {"model.layers.0.q.weight"})
    assert globs == ["model.layers.*.film.weight", "model.out.*.bias"]
    others = {"model.layers.7.film.weight"}
    exact = merging_recipes.globs_of(names, others)
    assert exact == [*names[:2], "model.out.*.bias"]
    assert not any(fnmatchcase(other, glob) for other in others for glob in exact)


def test_a_method_with_two_bits_has_a_recipe_for_them():
    recipes = merging_recipes.variants("least_squares", 0.7, {}, rescaled=True)
    name = "least_squares+masks"
    assert recipes == {
        name: {"method": "least_squares"},
        f"{name}+rescaled": {"method": "least_squares", "rescale": True},
        f"{name}+two_bits+rescaled": {"method": "least_squares", "rescale": True, "options": {"bits": 2}},
    }
    assert list(merging_recipes.variants("least_squares", 0.7, {}, rescaled=False)) == [name]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    base = save_tiny_base(folder / "base")
    full = ("model.action_decoder", "model.keyframe_head", "model.state_projector")
    for seed, name in enumerate(("soup", "stove"), 1):
        save_tiny_expert(folder / name, base, seed, (f"find the {name}",), full=full)
    names = merging_recipes.write_recipes(
        merging_recipes.Options(
            folder / "recipes",
            base,
            (folder / "soup", folder / "stove"),
            methods=("ties", "emr"),
            rescaled=("ties", "emr"),
            lam=0.7,
            private=("head",),
        )
    )
    assert names == ["naive", "ties", "ties+masks", "ties+masks+rescaled", "emr+masks"]
    for name in names:
        merge(load_recipe(folder / "recipes" / f"{name}.yaml"), folder / "merges" / name)
    return folder


def test_a_method_to_rescale_that_there_is_not_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"no merging method 'tie'\. Did you mean 'ties'"):
        merging_recipes.write_recipes(
            merging_recipes.Options(tmp_path / "out", tmp_path, (tmp_path,), rescaled=("tie",))
        )
    assert not (tmp_path / "out").exists()


def test_the_naive_recipe_averages_everything_and_the_others_keep_heads(recipes):
    manifests = {
        name: json.loads((recipes / "merges" / name / "merge.json").read_text())
        for name in ("naive", "ties", "ties+masks", "emr+masks")
    }
    experts = [load_file(recipes / name / "adapter_model.safetensors") for name in ("soup", "stove")]
    averaged = load_file(recipes / "merges/naive/model.safetensors")
    for name in [
        name for name in averaged if name.startswith(("model.action_decoder.", "model.state_projector."))
    ]:
        mean = sum(expert[f"base_model.model.{name}"] for expert in experts) / 2
        assert (averaged[name] - mean).abs().max() < 1e-6, name
    assert "private" not in manifests["naive"]["tensors"] and manifests["naive"]["masks"] is None
    for name in ("ties", "ties+masks", "emr+masks"):
        counts = manifests[name]["tensors"]
        assert counts["private"] and counts["averaged"] == 4, "the state projector's weights and biases"
        private = load_file(recipes / "merges" / name / "experts/soup/private.safetensors")
        assert all(".action_decoder." in tensor or ".keyframe_head." in tensor for tensor in private)
    assert manifests["ties"]["masks"] is None and manifests["ties+masks"]["masks"]["null_model"]
    rescaled = json.loads((recipes / "merges/ties+masks+rescaled/merge.json").read_text())
    assert rescaled["masks"] == manifests["ties+masks"]["masks"]
    assert set(rescaled["rescale"]["per_tensor"]) == {"soup", "stove"}
    assert not manifests["ties+masks"]["rescale"]["per_tensor"]
    assert manifests["emr+masks"]["masks"]
    assert yaml.safe_load((recipes / "recipes/ties+masks.yaml").read_text())["lambda"] == 0.7
    assert yaml.safe_load((recipes / "recipes/ties.yaml").read_text())["experts"] == ["../soup", "../stove"]


# --- the table ----------------------------------------------------------------------------------------


def save_run(folder, tasks, outcome, *, checkpoint="c" * 64, lose=0, route=None):
    """An evaluation of four initial states per task whose episode ends as `outcome(suite, state)` says."""
    plan = make_plan(
        suites=[place.split(":")[0] for place in tasks.split()],
        tasks=tasks,
        init_states=None,
        episodes_per_task=4,
        seed=0,
        protocol="oft",
        max_steps=None,
        checkpoint_hash=checkpoint,
        n_action_steps=8,
        image_size=32,
    )
    plan.save(folder)
    with EpisodeLog(folder, plan.episodes, checkpoint) as log:
        for episode in plan.episodes[lose:]:
            success = outcome(episode.suite, episode.init_state)
            facts = {"seed": episode.seed, "status": "success" if success else "failure", "success": success}
            facts |= {"steps": 9, "queries": 2, "wall_s": 1.0, "policy_s": 0.1, "worker_rss_mb": 1.0}
            facts |= {"checkpoint_hash": checkpoint, "versions": {}}
            told = route(episode) if route else None
            log.append(EpisodeRecord(episode.suite, episode.task, episode.init_state, route=told, **facts))


BOTH = "libero_object:0 libero_goal:7"


@pytest.fixture
def experiment(tmp_path, recipes):
    """Experts 8 of 8; ties 6 of 8; ties+masks unfinished; the bank's router wrong once, and failing there."""
    out = tmp_path / "experiment"
    save_run(out / "eval/expert-soup", "libero_object:0", lambda *_: True)
    save_run(out / "eval/expert-stove", "libero_goal:7", lambda *_: True)
    save_run(out / "eval/base", BOTH, lambda *_: False)
    save_run(out / "eval/ties", BOTH, lambda suite, state: suite == "libero_object" or state < 2)
    save_run(out / "eval/ties+masks", BOTH, lambda *_: True, lose=3)
    save_run(out / "eval/naive", BOTH, lambda *_: False)
    save_run(out / "eval/bank/oracle", BOTH, lambda *_: True)

    def route(episode):
        truth = "soup" if episode.suite == "libero_object" else "stove"
        acted = "soup" if episode.init_state == 0 else truth
        decision = {"query": 0, "guess": acted, "acted": acted, "margin": 0.5, "abstained": False}
        return {"truth": truth, "decisions": [decision]}

    save_run(
        out / "eval/bank/language", BOTH, lambda suite, i: suite == "libero_object" or i > 0, route=route
    )
    for part in ("recipes", "merges"):
        (out / part).symlink_to(recipes / part)
    (out / "commands.txt").write_text("vla train --out base \n")
    return out


def test_the_table_counts_pairs_and_judges(experiment, capsys):
    merging_table.main(merging_table.Options(experiment, SKILLS))
    content = json.loads((experiment / "table.json").read_text())
    rows = {row["variant"]: row for row in content["rows"]}
    assert list(rows) == [
        "base, without the skills",
        "experts alone",
        "bank, oracle",
        "bank, language",
        "merge: naive",
        "merge: ties",
        "merge: ties+masks",
    ]
    ties = rows["merge: ties"]
    assert [
        (ties["skills"][name]["successes"], ties["skills"][name]["episodes"]) for name in ("soup", "stove")
    ] == [
        (4, 4),
        (2, 4),
    ]
    assert ties["all"]["rate"] == 0.75 and ties["against_experts"]["difference"] == -0.25
    assert ties["against_experts"]["pairs"] == 8 and rows["experts alone"]["all"]["successes"] == 8
    assert ties["masks"] is None and 0 < rows["merge: ties+masks"]["masks"]["experts"]["selfish"] < 1
    routing = rows["bank, language"]["routing"]
    assert routing["accuracy"] == 7 / 8 and routing["confusion"] == [[4, 0], [1, 3]]
    assert rows["bank, oracle"]["routing"] is None
    best, bank = content["goals"]
    assert "Best of 2 merges" in best and "merge: ties loses 25.0 points" in best and best.endswith("missed.")
    assert "router language: 12.5 points below the oracle" in bank and bank.endswith("missed.")
    text = (experiment / "table.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    line = next(line for line in text.splitlines() if line.startswith("| merge: ties |"))
    assert "| 4/4 | 2/4 | 6/8 = 75.0 % (40.9 – 92.9) | -25.0 (" in line
    unfinished = next(line for line in text.splitlines() if line.startswith("| merge: ties+masks"))
    assert "5 of 8 counted" in unfinished and " / " in unfinished, "keep ratios beside the null model"
    assert "vla train --out base" in text and "- stove: turn on the stove" in text


def test_where_the_experts_solve_nothing_no_goal_is_reached(experiment):
    for skill, place in (("soup", "libero_object:0"), ("stove", "libero_goal:7")):
        run = experiment / f"eval/expert-{skill}"
        (run / "episodes.jsonl").unlink()
        save_run(run, place, lambda *_: False)
    content = merging_table.collect(merging_table.Options(experiment, SKILLS))
    (sentence,) = content["goals"]
    assert "solved nothing, so that no goal can be judged" in sentence
    (experiment / "eval/ties/episodes.jsonl").unlink()
    again = merging_table.markdown(merging_table.collect(merging_table.Options(experiment, SKILLS)))
    assert "| merge: ties, 0 of 8 counted, 0 errors | – | – | – |" in again


def test_without_an_evaluation_there_is_no_table(tmp_path):
    command = [
        sys.executable,
        str(SCRIPTS / "experiments/merging_table.py"),
        str(tmp_path),
        "--skills",
        SKILLS[0],
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Nothing has been evaluated" in done.stderr
