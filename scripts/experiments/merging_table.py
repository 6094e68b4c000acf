"""The table of `scripts/experiment_merging`: what every variant achieved on every skill.

    merging_table.py FOLDER --skills object=libero_object:0,1 goal=libero_goal:7,8

Reads the evaluations below FOLDER/eval and the merges' manifests, prints the table, and writes it to table.md
and table.json in FOLDER. All variants ran the same episodes, so each is held against the experts in pairs.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from vla.atomic import write_text
from vla.errors import UserError
from vla.evaluation.compare import Comparison
from vla.evaluation.plan import PLAN_FILE, Plan
from vla.evaluation.records import EpisodeRecord, read_records
from vla.evaluation.summary import SUMMARY_FILE, Score
from vla.evaluation.task_routing import summarise_routing
from vla.experts.merge import MERGE_FILE
from vla.experts.task_routers import TASK_ROUTERS
from vla.json_file import load_json
from vla.selection import parse_indices
from vla.sim.episode import Episode
from vla.sim.suites import load_suite

EXPERTS = "experts alone"
ORACLE = "oracle"
BANK = "bank, "
MERGE = "merge: "
COMMANDS_FILE = "commands.txt"
#: What the experiment set out to reach, in points of success.
MERGE_GOAL, ROUTER_GOAL, PUBLISHED_DROP = 3.0, 1.0, 6.5

Records = dict[Episode, EpisodeRecord]


@dataclass(frozen=True)
class Options:
    """Collect the evaluations of an experiment into one table."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The experiment's folder."""
    skills: tuple[str, ...]
    """NAME=SUITE:TASKS of every skill."""


@dataclass(frozen=True)
class Skill:
    """One skill: an expert's name and its tasks of a suite."""

    name: str
    suite: str
    tasks: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Skill:
        """Read ``NAME=SUITE:TASKS``; raises `UserError` if it is malformed or there is no such task."""
        name, equals, place = text.partition("=")
        suite, colon, tasks = place.partition(":")
        if not (name and equals and suite and colon and tasks):
            raise UserError(f"'{text}' is no skill; write NAME=SUITE:TASKS, as in goal=libero_goal:7,8.")
        count = len(load_suite(suite).tasks)
        return cls(name, suite, tuple(parse_indices(tasks, count, f"{suite} has no task")))

    def holds(self, episode: Episode) -> bool:
        """Whether the episode asks for this skill."""
        return episode.suite == self.suite and episode.task in self.tasks


@dataclass(frozen=True)
class Variant:
    """What was measured: `runs` are its evaluation folders, `merge` the merged checkpoint's, if it is one."""

    name: str
    runs: tuple[Path, ...]
    merge: Path | None = None

    @property
    def started(self) -> bool:
        """Whether any of its runs has a plan."""
        return any((run / PLAN_FILE).exists() for run in self.runs)


def variants(folder: Path, skills: Sequence[Skill]) -> list[Variant]:
    """All variants that FOLDER's evaluations belong to, in the order of the table."""
    runs = folder / "eval"
    recipes = sorted(path.stem for path in (folder / "recipes").glob("*.yaml"))
    found = [
        Variant("base, without the skills", (runs / "base",)),
        Variant(EXPERTS, tuple(runs / f"expert-{skill.name}" for skill in skills)),
        Variant("joint training, all weights", (runs / "joint-full",)),
        Variant("joint training, one LoRA expert", (runs / "joint-lora",)),
        *(Variant(f"{BANK}{router}", (runs / "bank" / router,)) for router in TASK_ROUTERS),
        *(Variant(f"{MERGE}{name}", (runs / name,), folder / "merges" / name) for name in recipes),
    ]
    return [variant for variant in found if variant.started]


def row_of(variant: Variant, skills: Sequence[Skill], experts: Records) -> dict[str, Any]:
    """Scores per skill and over all, the difference from the experts alone, and where both come from."""
    records = _records(variant.runs)
    planned = [episode for run in variant.runs for episode in _planned(run)]
    pairs = [(experts[episode], record) for episode, record in records.items() if episode in experts]
    against = Comparison.of(variant.name, pairs)
    return {
        "variant": variant.name,
        "skills": {
            skill.name: Score.of(r for e, r in records.items() if skill.holds(e)).as_dict()
            for skill in skills
        },
        "all": Score.of(records.values()).as_dict() | {"planned": len(planned)},
        "against_experts": {
            "pairs": against.pairs,
            "difference": against.difference,
            "interval": against.interval,
            "p_value": against.p_value,
        },
        "masks": _masks(variant.merge),
        "runs": [_provenance(run) for run in variant.runs],
    }


def routing_of(folder: Path, router: str, experts: Sequence[str]) -> dict[str, Any] | None:
    """What the bank's router decided, with its confusion matrix; None for the oracle, which is told."""
    runs = folder / "eval" / "bank"
    if router == ORACLE or not (runs / ORACLE / PLAN_FILE).exists():
        return None
    routed, oracle = read_records(runs / router), read_records(runs / ORACLE)
    return summarise_routing(Plan.load(runs / ORACLE), experts, routed, oracle)["total"]["routing"]


def collect(options: Options) -> dict[str, Any]:
    """Read the whole experiment; raises `UserError` if nothing has been evaluated yet."""
    skills = [Skill.parse(text) for text in options.skills]
    listed = variants(options.folder, skills)
    if not listed:
        raise UserError(f"Nothing has been evaluated in {options.folder} yet; run the stage evaluate first.")
    experts = _records(next((v.runs for v in listed if v.name == EXPERTS), ()))
    rows = []
    for variant in listed:
        row = row_of(variant, skills, experts)
        if variant.name.startswith(BANK):
            router = variant.name.removeprefix(BANK)
            row["routing"] = routing_of(options.folder, router, [skill.name for skill in skills])
        rows.append(row)
    commands = options.folder / COMMANDS_FILE
    return {
        "skills": {
            skill.name: [load_suite(skill.suite).task(task).language for task in skill.tasks]
            for skill in skills
        },
        "rows": rows,
        "goals": judge(rows),
        "commands": commands.read_text().splitlines() if commands.exists() else [],
    }


def judge(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence per goal of the experiment that can be judged, with the numbers that decide it.

    None can where the experts have not learned their skills: what never succeeds loses nothing.
    """
    by_name = {row["variant"]: row for row in rows if _finished(row)}
    experts = by_name.get(EXPERTS)
    if experts is None or not experts["all"]["successes"]:
        return ["The experts alone have not run, or solved nothing, so that no goal can be judged."]
    sentences = []
    merges = [row for name, row in by_name.items() if name.startswith(MERGE)]
    if merges:
        best = max(merges, key=lambda row: row["against_experts"]["difference"])
        drop = -100 * best["against_experts"]["difference"]
        sentences.append(
            f"Best of {len(merges)} merges, chosen on the measured episodes themselves: {best['variant']}"
            f" loses {_points(drop)} points against the experts alone (goal: at most {MERGE_GOAL:g};"
            f" MergeVLA's own loss: {PUBLISHED_DROP:g}): {'reached' if drop <= MERGE_GOAL else 'missed'}."
        )
    bank = {name.removeprefix(BANK): row for name, row in by_name.items() if name.startswith(BANK)}
    told = bank.pop(ORACLE, None)
    for router, row in bank.items() if told else ():
        drop = 100 * (told["all"]["rate"] - row["all"]["rate"])
        sentences.append(
            f"Bank with the router {router}: {_points(drop)} points below the oracle (goal: at most"
            f" {ROUTER_GOAL:g}): {'reached' if drop <= ROUTER_GOAL else 'missed'}."
        )
    return sentences


def _points(value: float) -> str:
    return f"{value + 0.0:.1f}"  # not "-0.0"


def markdown(content: Mapping[str, Any]) -> str:
    """The table, its goals and the commands, for people."""
    names = list(content["skills"])
    heads = [
        "variant",
        *names,
        "all (95 %)",
        "against experts, points (95 %)",
        "routed right",
        "keep",
        "selfish",
    ]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    lines += ["| " + " | ".join(_cells(row, names)) + " |" for row in content["rows"]]
    told = [f"- {name}: {'; '.join(texts)}" for name, texts in content["skills"].items()]
    notes = [
        "Success per skill and over all episodes with its Wilson interval; the difference is over the"
        " same episodes, in pairs (Newcombe's interval). Keep and selfish are the task masks' share of kept"
        " weights (mean over experts) and of weights that exactly one task uses, beside the null model of"
        " shuffled experts.",
        *content["goals"],
    ]
    commands = ["```", *content["commands"], "```"] if content["commands"] else []
    return "\n".join([*lines, "", *told, "", "\n\n".join(notes), "", *commands]).rstrip() + "\n"


def _cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    total, against = row["all"], row["against_experts"]
    low, high = (100 * bound for bound in total["interval"])
    done, planned = total["episodes"], total["planned"]
    partial = "" if _finished(row) else f", {done} of {planned} counted, {total['errors']} errors"
    difference = ""
    if against["pairs"] and row["variant"] != EXPERTS:
        bounds = ", ".join(f"{100 * bound:+.1f}" for bound in against["interval"])
        difference = f"{100 * against['difference']:+.1f} ({bounds})"
    routing = row.get("routing")
    return [
        row["variant"] + partial,
        *(_count(row["skills"][name]) for name in names),
        f"{_count(total)} = {100 * total['rate']:.1f} % ({low:.1f} – {high:.1f})" if done else "–",
        difference,
        f"{100 * routing['accuracy']:.1f} %" if routing and routing["decisions"] else "",
        *_mask_cells(row["masks"]),
    ]


def _mask_cells(masks: Mapping[str, Any] | None) -> list[str]:
    if not masks:
        return ["", ""]
    sides = [side for side in (masks["experts"], masks["null_model"]) if side]
    keep = [f"{statistics.mean(side['keep'].values()):.1%}" for side in sides]
    selfish = [f"{side['selfish']:.1%}" for side in sides]
    return [" / ".join(keep), " / ".join(selfish)]


def _finished(row: Mapping[str, Any]) -> bool:
    return row["all"]["planned"] > 0 and row["all"]["episodes"] == row["all"]["planned"]


def _count(score: Mapping[str, Any]) -> str:
    return f"{score['successes']}/{score['episodes']}" if score["episodes"] else "–"


def _records(runs: Iterable[Path]) -> Records:
    return {record.episode: record for run in runs for record in read_records(run)}


def _planned(run: Path) -> tuple[Episode, ...]:
    return Plan.load(run).episodes if (run / PLAN_FILE).exists() else ()


def _masks(merge: Path | None) -> dict[str, Any] | None:
    return load_json(merge / MERGE_FILE)["masks"] if merge and (merge / MERGE_FILE).exists() else None


def _provenance(run: Path) -> dict[str, Any]:
    if not (run / SUMMARY_FILE).exists():
        return {"run": run.name}
    told = load_json(run / SUMMARY_FILE)["provenance"]
    facts = ("command", "checkpoint", "checkpoint_hash", "plan_hash", "finished", "versions", "machine")
    return {"run": run.name} | {name: told[name] for name in facts}


def main(options: Options) -> None:
    """Collect, write and print."""
    content = collect(options)
    write_text(options.folder / "table.json", json.dumps(content, indent=1) + "\n")
    text = markdown(content)
    write_text(options.folder / "table.md", text)
    print(text)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
