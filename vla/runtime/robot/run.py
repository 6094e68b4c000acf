"""`vla run`: pre-flight, soft start, control loop, and an arm that ends at rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from vla.contract import PolicyContract
from vla.errors import UserError
from vla.robot_drivers import Arm, ArmConfig, Cycle, DriverFault, SupervisorConfig
from vla.robot_drivers.cameras import Cameras
from vla.robot_drivers.commands.options import ArmOptions, Bounds
from vla.runtime.chunk_scheduling import ChunkScheduler, make_scheduler
from vla.runtime.robot import preflight
from vla.runtime.robot.camera_options import make_cameras
from vla.runtime.robot.control_loop import ControlLoop, Listener, RunEnd
from vla.runtime.robot.dry_arm import DryArm
from vla.runtime.robot.policy_source import PolicyHere, open_policy
from vla.runtime.robot.policy_thread import PolicyThread
from vla.runtime.robot.run_record import RunRecord
from vla.runtime.robot.terminal_view import TerminalView
from vla.serving.experts import ExpertChoice
from vla.training.interruption import Interruption

DRY_SECONDS = 5.0
CAMERA_TIMEOUT = 15.0  # s; some take long to warm up


@dataclass(frozen=True, kw_only=True)
class RunConfig(ArmOptions):
    """A policy on an arm. Everything that keeps the arm safe is on by default."""

    task: str
    """What the arm shall do, in words."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Checkpoint folder of a policy that runs here; an expert, a bank or a merge too."""
    expert: str | None = None
    """Who acts of a bank or merge; by default the task router decides from --task."""
    task_router: str | None = None
    """Who decides that: language (the default), value_subspace or probe; none runs a merge as it is."""
    task_router_margin: float | None = None
    """Lead over the second expert below which nothing starts; the router's own by default."""
    server: str | None = None
    """Address of a policy that runs elsewhere, ws://HOST:PORT of a `vla serve`."""
    token: str | None = None
    """The server's token. Better kept in the environment variable VLA_TOKEN."""
    robot: Literal["so101", "trossen"] = "so101"
    """Which arm: an SO101 at --port, or a Trossen WidowX AI at --address."""
    address: str | None = None
    """Network address of a WidowX AI's controller, for example 192.168.1.2."""
    cameras: tuple[str, ...] = ()
    """One NAME=SOURCE per camera of the policy: top=0, wrist=/dev/video2, or JSON as LeRobot writes it."""
    joint_units: Literal["contract", "lerobot-degrees", "lerobot-normalized", "si"] = "contract"
    """In which units the dataset spoke of joints, if the checkpoint does not say."""
    scheduler: str = "real_time"
    """How chunks become actions: execute_all, receding_horizon, temporal_ensembling or real_time."""
    horizon: int | None = None
    """Actions executed per query of the policy; the scheduler's own choice if not given."""
    seconds: float | None = None
    """End after so many seconds; without it, Ctrl-C ends the run."""
    dry_run: bool = False
    """Touch nothing: show what would be sent, for 5 s unless --seconds says otherwise."""
    record: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """New folder for a record of everything that was asked, sent and measured."""
    rerun: bool = False
    """Show cameras, joints and latency in the Rerun viewer (extra 'viz')."""
    device: str | None = None
    """Where a policy of --checkpoint runs: cpu or cuda; the accelerator if there is one."""
    engine: str | None = None
    """Answer through the runtime engine; auto takes its fastest mode that changes actions by under 1 %."""
    seed: int = 0
    """Seed of policies that sample."""
    soft_start: float = 2.0
    """Seconds over which the arm comes up to speed."""
    max_frame_age: float | None = None
    """Seconds after which a camera's picture is too old to act on; the contract's if not given."""
    policy_timeout: float = 10.0
    """Seconds after which a policy that does not answer ends the run."""
    workspace: Annotated[Bounds | None, tyro.conf.arg(metavar="X0 X1 Y0 Y1 Z0 Z1")] = None
    """Box for the gripper in metres: x forwards from the arm's base, y to its left, z up from its foot."""
    driver_options: str = "{}"
    """More arguments of the driver, as JSON, for example {"reply_timeout": 0.05}."""
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    """Times of the arm's own watchdog."""


def run_robot(config: RunConfig) -> None:
    """Run a policy on an arm until its time is over, Ctrl-C, SIGTERM, or something fails.

    However it ends, the arm is braked, brought to rest and released. Raises `UserError` (before anything has
    moved) when pre-flight fails, and (after the arm was left) when the run ended by a fault.
    """
    console = Console(stderr=True)
    with ExitStack() as stack:
        policy = stack.enter_context(
            open_policy(
                config.checkpoint,
                config.server,
                config.token,
                config.device,
                config.engine,
                ExpertChoice(config.expert, config.task_router, config.task_router_margin),
                config.task,
            )
        )
        scheduler = make_scheduler(config.scheduler, policy.contract.chunk_size, config.horizon)
        cameras = stack.enter_context(Cameras(make_cameras(config.cameras, policy.contract)))
        record = _record(config, policy)
        if record is not None:
            stack.callback(record.discard)  # after the arm's process has closed its file
        arm, cycle, fault = _open_arm(config, record)
        if arm is not None:
            stack.callback(arm.close)
        with console.status("looking at everything, nothing moves"):
            checks, joints = _preflight(config, policy, scheduler, cameras, arm, cycle, fault)
        console.print(preflight.table(checks))
        preflight.require(checks)
        if record is not None:
            record.keep()
        policy.reset(config.seed)
        runner = Runner(config, policy, scheduler, cameras, arm, joints, console, record)
        runner.dry() if config.dry_run else runner.steer()


def _record(config: RunConfig, policy: PolicyHere) -> RunRecord | None:
    if config.record is None:
        return None
    facts = {
        "task": config.task,
        "policy": dict(policy.identity),
        "contract": policy.contract.as_dict(),
        "options": json.loads(json.dumps(asdict(config) | {"token": None}, default=str)),
    }
    return RunRecord(config.record, facts)


def arm_config(config: RunConfig, record: RunRecord | None) -> ArmConfig:
    """Return what the arm's own process is told. Raises `UserError` if options are not JSON, or no port."""
    try:
        options = json.loads(config.driver_options)
    except ValueError as error:
        raise UserError(f"--driver-options is not JSON ({error}).") from None
    if not isinstance(options, Mapping):
        raise UserError('--driver-options is no JSON object, for example {"reply_timeout": 0.05}.')
    return ArmConfig(
        config.robot,
        _place(config) | dict(options),
        supervisor=config.supervisor,
        record=None if record is None else record.arm_file,
        workspace=config.workspace,
    )


def _place(config: RunConfig) -> dict[str, str]:
    """Return where the arm is, as its driver's arguments. Raises `UserError` if that was not said."""
    if config.robot == "so101":
        return {"port": config.find_port(), "calibration": str(config.calibration_file)}
    if config.address is None:
        raise UserError("Say where the arm's controller is: --address 192.168.1.2, for example.")
    return {"address": config.address}


def _open_arm(
    config: RunConfig, record: RunRecord | None
) -> tuple[Arm | None, Cycle | None, UserError | None]:
    """Take the port and look at the arm; what goes wrong is for the pre-flight to report."""
    settings = arm_config(config, record)
    try:
        arm = Arm(settings)
    except UserError as fault:
        return None, None, fault
    try:
        return arm, arm.open(), None
    except DriverFault as fault:
        return arm, None, fault
    except BaseException:
        arm.close()
        raise


def _preflight(
    config: RunConfig,
    policy: PolicyHere,
    scheduler: ChunkScheduler,
    cameras: Cameras,
    arm: Arm | None,
    cycle: Cycle | None,
    fault: UserError | None,
) -> tuple[list[preflight.Check], preflight.Joints | None]:
    """Make every check."""
    contract, info = policy.contract, None if arm is None else arm.info
    convention = None if config.joint_units == "contract" else config.joint_units
    checks = [
        preflight.check_arm(cycle, fault),
        preflight.check_action_space(contract),
        *preflight.check_joints(contract, info, convention),
        *preflight.check_workspace(config.workspace, info, cycle),
        preflight.check_rate(contract, info, config.supervisor.stale_hold),
        *preflight.check_cameras(contract, cameras, CAMERA_TIMEOUT),
    ]
    failing = any(check.verdict == "fails" for check in checks)
    joints = None if failing else preflight.map_joints(contract, info, convention)
    checks.append(preflight.check_policy(contract, policy, cycle, cameras, joints, scheduler, config.task))
    if policy.expert is not None:
        checks.append(preflight.Check("expert", "ok", policy.expert.sentence))
    return checks, joints


class Runner:
    """Everything that passed pre-flight, put to work."""

    def __init__(
        self,
        config: RunConfig,
        policy: PolicyHere,
        scheduler: ChunkScheduler,
        cameras: Cameras,
        arm: Arm,
        joints: preflight.Joints,
        console: Console,
        record: RunRecord | None,
    ):
        self.config, self.policy, self.scheduler = config, policy, scheduler
        self.cameras, self.arm, self.joints = cameras, arm, joints
        self.console, self.record = console, record

    @property
    def contract(self) -> PolicyContract:
        """The policy's contract."""
        return self.policy.contract

    def dry(self) -> None:
        """Show what would be sent. Torque stays as it is."""
        dry = DryArm(self.arm, self._say)
        thread = PolicyThread(self.policy)
        loop = self._loop(dry, thread)
        with Interruption() as interruption:
            end = loop.run(stop_when(interruption), self.config.seconds or DRY_SECONDS)
        thread.close()
        if self.record is not None:
            self.record.finish(end, loop.status, "not touched")
        if end.failed:
            raise UserError(f"{end.reason} Nothing has moved.")
        self._say(f"{end.reason} Nothing has moved.")

    def steer(self) -> None:
        """Take hold of the arm, let the policy steer it, and leave it at rest."""
        thread = PolicyThread(self.policy)
        loop = self._loop(self.arm, thread)
        end: RunEnd | None = None
        try:
            with Interruption() as interruption:
                fault = self.arm.latest().fault
                if fault is not None:  # since pre-flight
                    raise fault
                self.arm.enable()
                with TerminalView(loop, self.arm, self.cameras, self.console) as view:
                    end = loop.run(stop_when(interruption, view.tick), self.config.seconds)
        finally:
            thread.close()
            said, safe = self._leave(end)
            if self.record is not None:
                self.record.finish(end, loop.status, said)
        if end.failed or not safe:
            raise UserError(f"{end.reason} {said}" if said not in end.reason else end.reason)
        self._say(f"{end.reason} {said}")
        self._summary(loop)

    def _leave(self, end: RunEnd | None) -> tuple[str, bool]:
        """Bring the arm to rest and release it; return how that went in words, and whether it went well."""
        self._say(f"{end.reason if end else 'The run failed.'} Bringing the arm to rest.")
        try:
            ending = self.arm.close()
        except KeyboardInterrupt:
            self._say("Not waiting. The arm's own process still brings it to rest.")
            raise
        if ending is None:
            return (
                "The process that owned the arm was killed: its servos hold. Support it and cut power.",
                False,
            )
        well = ending.at_rest is not False and not ending.unreleased
        return ending.sentence.removeprefix(ending.reason).strip(), well

    def _loop(self, arm: Arm | DryArm, thread: PolicyThread) -> ControlLoop:
        listeners: list[Listener] = [] if self.record is None else [self.record]
        if self.config.rerun:
            from vla.runtime.robot.rerun_view import RerunView

            listeners.append(RerunView(self.config.task, self.arm.info))
        age = self.config.max_frame_age
        return ControlLoop(
            arm,
            self.cameras,
            thread,
            self.scheduler,
            self.contract,
            (self.joints.state, self.joints.action),
            self.config.task,
            max_frame_age=self.contract.max_frame_age if age is None else age,
            policy_timeout=self.config.policy_timeout,
            soft_start=self.config.soft_start,
            listeners=tuple(listeners),
        )

    def _summary(self, loop: ControlLoop) -> None:
        status = loop.status
        self._say(
            f"{status.periods} control periods at {status.rate:.1f} Hz, {status.missed} deadlines missed;"
            f" {status.queries} queries, {status.late} answered too late."
        )

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def stop_when(interruption: Interruption, tick=lambda: None):
    """Return the control loop's question whether to stop; `tick` is called with it, once per period."""

    def stop() -> str | None:
        tick()
        return "The run was interrupted." if interruption.requested else None

    return stop
