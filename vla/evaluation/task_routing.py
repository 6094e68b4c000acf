"""``vla eval`` of a bank or a merge: success with the router and with the oracle, and how often it was right.

An episode in which the router's expert was the right one throughout is the oracle's episode too, action by
action; its row is taken over, and only the others are run again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vla.atomic import write_text
from vla.evaluation.display import percent
from vla.evaluation.files import output_folder
from vla.evaluation.plan import PLAN_FILE, Plan
from vla.evaluation.records import ERROR, EpisodeLog, EpisodeRecord, read_records
from vla.evaluation.rollout import SimulationFactory, make_simulation
from vla.evaluation.run import EvalConfig, evaluate_source, plan_of
from vla.evaluation.summary import Score
from vla.evaluation.task_routed import ExpertsSource, Routing, known_instructions, right_experts
from vla.experts.task_routers import require_router
from vla.experts.task_routers.confusion import Confusion, Verdict

TASK_ROUTING_FILE = "task_routing.json"
ORACLE = "oracle"


def evaluate_experts(config: EvalConfig, simulate: SimulationFactory = make_simulation) -> dict[str, Any]:
    """Evaluate ``config.checkpoint`` with its router, and with the oracle; return what is reported.

    The oracle alone goes to ``config.out`` itself; otherwise both have a folder of their own there. Raises
    `UserError` as `evaluate_source` does, and where nobody says which expert is right for a task.
    """
    name = config.task_router or ORACLE
    require_router(name, config.task_router_parity)
    routing = Routing(name, config.task_router_margin, config.task_router_parity, config.reroute_every)
    untold = ExpertsSource.open(config.checkpoint, routing)
    known = known_instructions(config.checkpoint)
    routed = untold.told(right_experts(plan_of(config, untold).tasks, known, config.task_experts))
    if name == ORACLE:
        return evaluate_source(config, routed, simulate)
    evaluate_source(replace(config, out=config.out / name), routed, simulate)
    oracle = routed.routed_by(Routing(ORACLE))
    oracle_config = _adopt(config, routed, oracle)
    evaluate_source(oracle_config, oracle, simulate)
    summary = summarise_routing(
        Plan.load(oracle_config.out),
        tuple(known),
        *(read_records(config.out / run) for run in (name, ORACLE)),
    )
    summary = {"router": name, "margin": routing.margin, "reroute_every": routing.every} | summary
    write_text(config.out / TASK_ROUTING_FILE, json.dumps(summary, indent=1) + "\n")
    print_routing(summary, config.out)
    return summary


def _adopt(config: EvalConfig, routed: ExpertsSource, oracle: ExpertsSource) -> EvalConfig:
    """Take over the rows that the router got right, and return the configuration that runs the rest."""
    folder = config.out / ORACLE
    with output_folder(folder, resume=config.resume, overwrite=config.overwrite):
        plan = plan_of(config, oracle)
        if not (folder / PLAN_FILE).exists():
            plan.save(folder)
        with EpisodeLog(folder, plan.episodes, oracle.hash) as log:
            done = {record.episode for record in log.records}
            for record in read_records(config.out / routed.routing.router):
                if record.episode not in done and _right_throughout(record):
                    log.append(_as_oracle(record, oracle))
    return replace(config, out=folder, resume=True, overwrite=False)


def _right_throughout(record: EpisodeRecord) -> bool:
    if record.status == ERROR or record.route is None:
        return False
    return all(decision["acted"] == record.route["truth"] for decision in record.route["decisions"])


def _as_oracle(record: EpisodeRecord, oracle: ExpertsSource) -> EpisodeRecord:
    return replace(
        record,
        checkpoint_hash=oracle.hash,
        route={"truth": record.route["truth"], "decisions": [], "adopted": True},
    )


def summarise_routing(
    plan: Plan, experts: Sequence[str], routed: Sequence[EpisodeRecord], oracle: Sequence[EpisodeRecord]
) -> dict[str, Any]:
    """Scores with router and oracle and the router's verdicts, per task and in total.

    Only an episode's first decision counts as its verdict: later ones are made in scenes that the expert in
    charge has brought about.
    """
    rows = []
    for task in plan.tasks:
        mine = [_of_task(records, task.suite, task.task) for records in (routed, oracle)]
        truth = next((r.route["truth"] for r in mine[0] if r.route), None)
        facts = {"suite": task.suite, "task": task.task, "language": task.language, "expert": truth}
        rows.append(facts | _compare(experts, *mine))
    return {"tasks": rows, "total": _compare(experts, routed, oracle)}


def _compare(
    experts: Sequence[str], routed: Sequence[EpisodeRecord], oracle: Sequence[EpisodeRecord]
) -> dict[str, Any]:
    verdicts = [
        Verdict(r.route["truth"], first["acted"], first["margin"], first["abstained"])
        for r in routed
        if r.status != ERROR and r.route
        for first in r.route["decisions"][:1]
    ]
    return {
        "with_router": Score.of(routed).as_dict(),
        "with_oracle": Score.of(oracle).as_dict(),
        "routing": Confusion.of(experts, verdicts).as_dict(),
    }


def _of_task(records: Sequence[EpisodeRecord], suite: str, task: int) -> list[EpisodeRecord]:
    return [record for record in records if (record.suite, record.task) == (suite, task)]


def print_routing(summary: dict[str, Any], out: Path) -> None:
    """Print one row per task, the total and the confusion matrix."""
    table = Table(title=f"task router '{summary['router']}'", title_justify="left")
    for heading in ("task", "expert", "with oracle", "with router", "router right", "when sure", "abstained"):
        table.add_column(heading, justify="left" if heading in ("task", "expert") else "right", no_wrap=True)
    for row in summary["tasks"]:
        table.add_row(f"{row['suite']} {row['task']}", row["expert"] or "", *_cells(row))
    table.add_section()
    table.add_row("total", "", *_cells(summary["total"]), style="bold")
    console = Console()
    console.print(table)
    routing = summary["total"]["routing"]
    confusion = Table(title="confusion: who acted", title_justify="left")
    for heading in ("right expert", *routing["experts"]):
        confusion.add_column(heading)
    for name, counts in zip(routing["experts"], routing["confusion"], strict=True):
        confusion.add_row(name, *map(str, counts))
    console.print(confusion)
    console.print(f"Routing: {out / TASK_ROUTING_FILE}", highlight=False, soft_wrap=True)


def _cells(row: dict[str, Any]) -> list[str]:
    routing = row["routing"]
    return [
        percent(row["with_oracle"]["rate"]),
        percent(row["with_router"]["rate"]),
        percent(routing["accuracy"]),
        percent(routing["accuracy_when_sure"]),
        percent(routing["abstained"]),
    ]
