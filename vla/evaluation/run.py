"""``vla eval``: measure a policy over a fixed plan of episodes, resumably, with provenance."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vla.atomic import write_bytes
from vla.contract import PolicyContract
from vla.errors import UserError
from vla.evaluation.display import RunDisplay, print_scores
from vla.evaluation.engine_source import EngineSource
from vla.evaluation.files import output_folder
from vla.evaluation.plan import PLAN_FILE, Plan, episode_name, make_plan
from vla.evaluation.policy_source import SHIPPED_CHECKPOINT, PolicySource, open_source
from vla.evaluation.records import ERROR, FAILURE, EpisodeLog, EpisodeRecord
from vla.evaluation.report import write_report
from vla.evaluation.rollout import (
    Request,
    RolloutJob,
    SimulationFactory,
    check_contract,
    image_size,
    make_simulation,
)
from vla.evaluation.schedule import EpisodeQueue
from vla.evaluation.summary import save_summary, summarise
from vla.evaluation.task_routed import holds_experts
from vla.evaluation.workers import Backend, LocalWorkers, supervise
from vla.runtime.chunk_scheduling import default_horizon
from vla.sim.episode import Episode
from vla.sim.suites import load_suite
from vla.training.curves import draw_curves
from vla.training.metrics import METRICS_FILE


@dataclass(frozen=True)
class EvalConfig:
    """Measure a checkpoint in LIBERO, or on the emulated SO101's table."""

    checkpoint: Path = SHIPPED_CHECKPOINT
    """A checkpoint (training run, its checkpoints/last, pretrained_model folder), expert, bank or merge."""
    task_router: str | None = None
    """Who chooses the expert of a bank or merge: oracle (the default), language, value_subspace or probe; any
    but the oracle is measured beside it. `none` takes a merge as the ordinary checkpoint that it also is."""
    task_router_margin: float | None = None
    """Lead over the second expert below which the router abstains; its own by default."""
    task_router_parity: bool = False
    """Use the published form of the router where ours differs (value_subspace)."""
    reroute_every: int = 0
    """Choose the expert again every so many queries; 0 chooses once per episode."""
    task_experts: tuple[str, ...] = ()
    """Which expert is right, as SUITE=EXPERT or SUITE:TASK=EXPERT, where the experts' cards do not say."""
    suite: tuple[str, ...] = ("libero_object",)
    """One or several suites: LIBERO, LIBERO-PRO (libero_object_swap, ...) or so101_tabletop."""
    tasks: str | None = None
    """Task indices, for example 0,3 or 0-4, of every suite, or suite by suite in one argument, for example
    "libero_goal:0,3 libero_10:1"; all by default."""
    init_states: str | None = None
    """The benchmark's initial states, for example 20-49; all 50 by default."""
    episodes_per_task: int | None = None
    """Use only the first so many of the initial states; all (50) by default."""
    out: Path = Path("outputs/eval")
    """Folder for plan.json, episodes.jsonl, summary.json, report.html and videos/."""
    resume: bool = False
    """Go on with the evaluation in --out; episodes that are done stay done, errors are run again."""
    overwrite: bool = False
    """Replace the evaluation in --out."""
    workers: int = 2
    """Simulations at a time; each takes one core and under 2 GB."""
    ray: str | None = None
    """Run the workers as tasks of the Ray cluster at this address ("local" starts one here)."""
    step_limit: Literal["oft", "lerobot"] = "oft"
    """Control steps per episode: the protocol of OpenVLA-OFT or that of LeRobot."""
    max_steps: int | None = None
    """Stop every episode after so many steps even if the protocol allows more (for a quick look)."""
    n_action_steps: int | None = None
    """Actions to execute per query; by default the checkpoint's own number, or what suits the scheduler."""
    scheduler: str = "execute_all"
    """How chunks become actions: execute_all, receding_horizon, temporal_ensembling or real_time."""
    policy_delay: int = 0
    """Control steps that the world goes on while the policy thinks; 0 stops the clock, as LIBERO does."""
    engine: str | None = None
    """Answer through the runtime engine: fp32, fp32_compiled, bf16, bf16_compiled or int8."""
    seed: int = 0
    """0 keeps the benchmark's seed of every episode; another number moves all of them."""
    videos: Literal["none", "failures", "all"] = "none"
    """Episodes to run once more for a film at true speed in the report; also later, with --resume."""
    max_videos: int = 4
    """How many episodes to film, spread over the tasks; filming one takes about ten times its time."""
    episode_timeout: float = 900.0
    """Seconds after which an episode counts as hung and its worker is replaced."""


def evaluate(config: EvalConfig) -> None:
    """Run `vla eval`; raise `UserError` for bad input, or at the end if episodes ended in an error."""
    if config.task_router != "none" and holds_experts(config.checkpoint):
        from vla.evaluation.task_routing import evaluate_experts

        if config.engine is not None:
            raise UserError("--engine runs plain checkpoints, not experts, banks or merges; leave it out.")
        evaluate_experts(config)
        return
    if config.task_router not in (None, "none"):
        raise UserError(f"{config.checkpoint} is neither a bank nor a merge; leave out --task-router.")
    source = open_source(config.checkpoint)
    evaluate_source(config, source if config.engine is None else EngineSource.of(source, config.engine))


def evaluate_source(
    config: EvalConfig, source: PolicySource, simulate: SimulationFactory = make_simulation
) -> dict[str, Any]:
    """Evaluate any policy source (``config.checkpoint`` is not read) and return the summary."""
    _check(config)
    contract = source.contract
    for name in config.suite:
        load_suite(name)  # an unknown suite is the first thing to say
    check_contract(contract, config.suite)
    plan = plan_of(config, source)
    started = time.monotonic()
    with output_folder(config.out, resume=config.resume, overwrite=config.overwrite) as folder:
        _settle_plan(plan, folder)
        job = RolloutJob(source, plan, simulate)
        with EpisodeLog(folder, plan.episodes, source.hash) as log:
            _run_plan(config, job, log, folder)
            records = in_plan_order(plan, log.records)
        summary = summarise(plan, records, source, workers=config.workers, wall_s=time.monotonic() - started)
        save_summary(folder, summary)
        unrepeated = _film(config, job, records, folder)
        report = write_report(folder, plan, records, summary)
    _mark_in_curves(config.out)
    print_scores(summary, report)
    _complain(records, unrepeated, report)
    return summary


def plan_of(config: EvalConfig, source: PolicySource) -> Plan:
    """The plan that `config` asks for with `source`; raises `UserError` as `make_plan` does."""
    contract = source.contract
    return make_plan(
        suites=config.suite,
        tasks=config.tasks,
        init_states=config.init_states,
        episodes_per_task=config.episodes_per_task,
        seed=config.seed,
        protocol=config.step_limit,
        max_steps=config.max_steps,
        checkpoint_hash=source.hash,
        n_action_steps=_action_steps(config, contract),
        image_size=image_size(contract),
        scheduler=config.scheduler,
        policy_delay=config.policy_delay,
        engine=config.engine,
    )


def _mark_in_curves(out: Path) -> None:
    """Draw the curves of the training run that the evaluation lies in, if any, with the new success rate."""
    for folder in out.resolve().parents:
        if (folder / METRICS_FILE).exists():
            draw_curves(folder)


def in_plan_order(plan: Plan, records: Iterable[EpisodeRecord]) -> list[EpisodeRecord]:
    """Sort `records` as their episodes stand in the plan."""
    place = {episode: i for i, episode in enumerate(plan.episodes)}
    return sorted(records, key=lambda record: place[record.episode])


def film_choice(records: Iterable[EpisodeRecord], which: str, limit: int) -> list[Episode]:
    """Choose up to `limit` episodes to film: the first of every task, then the second, and so on."""
    wanted = [
        record
        for record in records
        if record.status == FAILURE or (which == "all" and record.status != ERROR)
    ]
    rank: dict[tuple[str, int], int] = {}
    ranked = []
    for record in wanted:
        scene = (record.suite, record.task)
        rank[scene] = rank.get(scene, -1) + 1
        ranked.append((rank[scene], record.episode))
    return [] if which == "none" else [episode for _, episode in sorted(ranked)[:limit]]


def _check(config: EvalConfig) -> None:
    for option, value in (
        ("--workers", config.workers),
        ("--max-steps", config.max_steps),
        ("--episode-timeout", config.episode_timeout),
    ):
        if value is not None and value <= 0:
            raise UserError(f"{option} must be positive, not {value}.")
    for option, value in (("--max-videos", config.max_videos), ("--policy-delay", config.policy_delay)):
        if value < 0:
            raise UserError(f"{option} must not be negative, not {value}.")


def _action_steps(config: EvalConfig, contract: PolicyContract) -> int:
    """Executed actions per query: the option, else the checkpoint's number, which is one for execute_all."""
    steps = default_horizon(config.scheduler, contract.chunk_size)
    if config.n_action_steps is not None:
        steps = config.n_action_steps
    elif config.scheduler == "execute_all":
        steps = contract.n_action_steps
    if not 1 <= steps <= contract.chunk_size:
        raise UserError(
            f"--n-action-steps {steps} does not fit: the checkpoint predicts {contract.chunk_size} actions"
            " per query."
        )
    return steps


def _settle_plan(plan: Plan, folder: Path) -> None:
    """Write the plan of a fresh folder, or make sure that the one there is the same."""
    if not (folder / PLAN_FILE).exists():
        plan.save(folder)
        return
    problems = Plan.load(folder).differences(plan)
    if problems:
        raise UserError(
            f"--resume refused: {folder} holds another evaluation ({'; '.join(problems)}). Use the same "
            "options as before, --overwrite, or another --out."
        )


def _backend(config: EvalConfig, job: RolloutJob) -> Backend:
    if config.ray is None:
        return LocalWorkers(job, config.workers, config.episode_timeout)
    from vla.evaluation.ray_workers import RayWorkers

    return RayWorkers(job, config.workers, config.episode_timeout, config.ray)


def _run_plan(config: EvalConfig, job: RolloutJob, log: EpisodeLog, folder: Path) -> None:
    """Run what is not yet in the log; the first episode of every task also leaves a router trace."""
    done = {record.episode for record in log.records}
    traced = {(episode.suite, episode.task): episode for episode in reversed(job.plan.episodes)}
    queue = EpisodeQueue(
        Request(episode, trace=traced[episode.suite, episode.task] == episode)
        for episode in job.plan.episodes
        if episode not in done
    )
    if not len(queue):
        return
    with RunDisplay(len(job.plan.episodes), log.records) as display:
        for outcome in supervise(_backend(config, job), queue, job.source.hash):
            if outcome.trace is not None:
                outcome.trace.save(folder / "routing" / f"{episode_name(outcome.request.episode)}.npz")
            log.append(outcome.record)
            display.advance(outcome.record)


def _film(config: EvalConfig, job: RolloutJob, records: list[EpisodeRecord], folder: Path) -> list[str]:
    """Run the chosen episodes again, rendering every step; return the names of those that did not repeat."""
    first = {record.episode: record for record in records}
    chosen = [
        episode
        for episode in film_choice(records, config.videos, config.max_videos)
        if not (folder / "videos" / f"{episode_name(episode)}.mp4").exists()
    ]
    unrepeated: list[str] = []
    queue = EpisodeQueue(Request(episode, video=True) for episode in chosen)
    if not chosen:
        return unrepeated
    with RunDisplay(len(chosen), [], title="filming") as display:
        for outcome in supervise(_backend(config, job), queue, job.source.hash):
            name, record = episode_name(outcome.request.episode), first[outcome.request.episode]
            display.advance(outcome.record)
            if (outcome.record.status, outcome.record.steps) == (record.status, record.steps):
                write_bytes(folder / "videos" / f"{name}.mp4", outcome.video)
            else:
                unrepeated.append(f"{name} ({outcome.record.status} instead of {record.status})")
    return unrepeated


def _complain(records: list[EpisodeRecord], unrepeated: list[str], report: Path) -> None:
    broken = [record for record in records if record.status == ERROR]
    if broken:
        raise UserError(
            f"{len(broken)} of {len(records)} episodes ended in an error and are not counted "
            f"(the first: {broken[0].errors[-1]}); see {report}, then use --resume to run them again."
        )
    if unrepeated:
        raise UserError(
            f"These episodes went differently when they were filmed: {', '.join(unrepeated)}; the rows may "
            "come from another machine or another version. Evaluate again with --overwrite."
        )
