"""LeRobot's view of an SO101 behind our safety layer: ``--robot.type=cogmerge_so101``.

To LeRobot's tools this is its own ``so101_follower``: the same names and units of features, the same
calibration file, the same `name` in a dataset. What they ask for goes to the arm's own process (`Arm`),
through the safety filter and the supervisor; however the tool ends, killed included, the arm ends at rest,
released.

    connect              identify the arm, first pictures, then hold it where it stands; asks nothing
    first actions        the way to where they lead is driven slowly (`soft_start`)
    no action, 0.25 s    the arm brakes and holds
    no action, 3 s       it ramps to rest, and comes back slowly with the next action
    no call, `silence`   it is left: at rest, released; the next call says so
    disconnect           brake, ramp to rest, release
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from lerobot.cameras import CameraConfig, make_cameras_from_configs
from lerobot.lerobot_types import RobotAction, RobotObservation
from lerobot.robots import Robot, RobotConfig
from lerobot.utils.decorators import check_if_already_connected, check_if_not_connected

from vla.contract import ACTION_KEY, Vector
from vla.errors import UserError
from vla.robot_drivers import Arm, ArmConfig, Cycle, DriverFault, LimitViolation, Mode, SupervisorConfig
from vla.robot_drivers.cameras import Cameras
from vla.robot_drivers.so101.calibration import GRIPPER, JOINTS
from vla.runtime.robot.joint_mapping import JointMapping
from vla.runtime.robot.soft_start import SoftStart

FEATURES = tuple(f"{name}.pos" for name in JOINTS)

CAMERA_TIMEOUT = 15.0
"""Seconds for the first pictures; some cameras take long to warm up."""

LOOK_AGAIN = 0.01  # s

LONGEST_WAY = 0.1
"""Seconds within which an action is due, however seldom the tool asks."""

logger = logging.getLogger(__name__)


@RobotConfig.register_subclass("cogmerge_so101")
@dataclass(kw_only=True)
class CogMergeSo101Config(RobotConfig):
    """Which arm, at which port, with which cameras; everything that keeps it safe is on by default.

    `use_degrees` is LeRobot's: body joints in degrees, or from -100 to 100. `soft_start` (s) is how long the
    way to the first actions takes to come up to speed. A picture older than `max_frame_age` (s) is not passed
    on. `silence` (s) is how long the tool may be busy with other things, encoding videos for example.
    `record` is a new file for everything asked, sent and measured (`vla robot replay` drives it again).
    `workspace` is a box for the gripper, ``[x0, x1, y0, y1, z0, z1]`` in metres from the arm's base.
    `driver_options` are arguments of the driver, for example ``{"reply_timeout": 0.05}``.
    """

    port: str
    id: str | None = "so101"
    cameras: dict[str, CameraConfig] = field(default_factory=dict)
    use_degrees: bool = True
    soft_start: float = 2.0
    max_frame_age: float = 0.5
    silence: float = 300.0
    record: Path | None = None
    workspace: list[float] | None = None
    driver_options: dict[str, float] = field(default_factory=dict)
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)


class CogMergeSo101(Robot):
    """An SO101 that LeRobot steers and `vla.robot_drivers` keeps safe.

    Methods raise LeRobot's errors for a wrong order of calls, a `DriverFault` for what the arm reports and a
    `CameraFault` for a camera: sentences that a person can act on.
    """

    config_class = CogMergeSo101Config
    name = "so_follower"  # LeRobot's own: decides where calibrations are, and what a dataset says

    def __init__(self, config: CogMergeSo101Config):
        self._arm: Arm | None = None
        self._asked_at = 0.0
        super().__init__(config)
        self.config = config
        self.cameras = make_cameras_from_configs(config.cameras)
        if any(getattr(camera, "use_depth", False) for camera in self.cameras.values()):
            raise UserError("Depth pictures are not passed on: leave out use_depth, or take so101_follower.")
        turned = [name for name, it in self.calibration.items() if it.drive_mode and name != GRIPPER]
        if turned and not config.use_degrees:
            raise UserError(
                f"{self.calibration_fpath} turns {', '.join(turned)} round (drive_mode), which only LeRobot's"
                " own follower does in units of -100 to 100: use degrees, or calibrate with drive_mode 0."
            )

    @property
    def observation_features(self) -> dict[str, type | tuple]:
        """Joint positions, and (height, width, 3) of every camera."""
        pictures = {name: (it.height, it.width, 3) for name, it in self.cameras.items()}
        return self.action_features | pictures

    @property
    def action_features(self) -> dict[str, type]:
        """Joint positions, ``shoulder_pan.pos`` to ``gripper.pos``."""
        return dict.fromkeys(FEATURES, float)

    @property
    def is_connected(self) -> bool:
        """Whether `connect` was called and `disconnect` was not."""
        return self._arm is not None

    @property
    def is_calibrated(self) -> bool:
        """An arm that does not carry the calibration of its file cannot be connected."""
        return self.is_connected

    def calibrate(self) -> None:
        """Refuse: the arm's process has the port. Raises `UserError`."""
        raise UserError(
            f"Calibrate with `vla robot calibrate --port {self.config.port} --id {self.id}`, or with"
            " `lerobot-calibrate --robot.type=so101_follower`: the file is the same."
        )

    def configure(self) -> None:
        """The arm's process has written every limit when `connect` returns."""

    @check_if_already_connected
    def connect(self, calibrate: bool = True) -> None:
        """Take hold of the arm where it stands. Nothing is asked for, whatever `calibrate` says."""
        with ExitStack() as stack:
            arm = stack.enter_context(Arm(self._arm_config()))
            arm.open()
            self._pictures = stack.enter_context(Cameras(self.cameras))
            self._pictures.wait_for_first(CAMERA_TIMEOUT)
            convention = "lerobot-degrees" if self.config.use_degrees else "lerobot-normalized"
            self._mapping = JointMapping.make(Vector(ACTION_KEY, FEATURES, ()), arm.info, convention)
            self._soft_start = SoftStart(arm.info, self.config.soft_start)
            arm.enable()
            self._arm = arm
            stack.pop_all()  # kept, until `disconnect`

    @check_if_not_connected
    def get_observation(self) -> RobotObservation:
        """Return where the joints are, and the newest picture of every camera, (H, W, 3) uint8 RGB."""
        cycle = self._look()
        frames = self._pictures.fresh(self.config.max_frame_age)
        return self._features(cycle.state.q) | {name: frame.image for name, frame in frames.items()}

    @check_if_not_connected
    def send_action(self, action: RobotAction) -> RobotAction:
        """Ask the arm to go there, and return what it is being sent: where the filter has got to by now.

        Raises `LimitViolation` unless there is one finite number for every joint.
        """
        asked = self._setpoint(action)
        cycle = self._look()
        if cycle.mode is Mode.REST:
            logger.warning("Without an action the arm went to rest; it follows again, slowly at first.")
            self._arm.hold()
            self._soft_start = SoftStart(self._arm.info, self.config.soft_start)
        now = time.monotonic()
        # LeRobot says nowhere how often it will ask; it keeps a rate, so as long as since it asked last.
        within = min(now - self._asked_at, LONGEST_WAY)
        self._asked_at = now
        self._arm.setpoint(self._soft_start.limit(asked, cycle.state.q, now), within=within)
        return self._features(cycle.state.q if cycle.sent is None else cycle.sent)

    @check_if_not_connected
    def disconnect(self) -> None:
        """Bring the arm to rest and release it. Raises `DriverFault` if that was not seen to succeed."""
        arm, self._arm = self._arm, None
        try:
            ending = arm.close()
        finally:
            self._pictures.close()
        if ending is None:
            raise DriverFault("The process that owned the arm was killed: support the arm and cut its power.")
        if ending.at_rest is False or ending.unreleased:
            raise DriverFault(ending.sentence)
        logger.info(ending.sentence)

    def _arm_config(self) -> ArmConfig:
        port = {"port": self.config.port, "calibration": str(self.calibration_fpath)}
        return ArmConfig(
            "so101",
            port | self.config.driver_options,
            heartbeat_timeout=self.config.silence,
            supervisor=self.config.supervisor,
            record=self.config.record,
            workspace=self.config.workspace,
        )

    def _look(self) -> Cycle:
        """Return a control period with a sample that is young enough; raise what the arm reports.

        Ends: without samples the supervisor declares the arm lost.
        """
        while True:
            cycle = self._arm.latest()
            if cycle.mode in (Mode.FAULT, Mode.LOST):
                raise cycle.fault
            if cycle.state.age(time.monotonic()) <= self.config.supervisor.sample_patience:
                return cycle
            time.sleep(LOOK_AGAIN)

    def _setpoint(self, action: RobotAction) -> dict[str, float]:
        """Return the action in the driver's units, by joint."""
        given = {key: float(value) for key, value in action.items() if key.endswith(".pos")}
        wrong = sorted(
            set(given) ^ set(FEATURES) | {key for key, it in given.items() if not math.isfinite(it)}
        )
        if wrong:
            raise LimitViolation(
                f"An action needs one finite number per joint; wrong are {', '.join(wrong)}."
            )
        return self._mapping.to_setpoint([given[key] for key in FEATURES])

    def _features(self, q) -> dict[str, float]:
        return dict(zip(FEATURES, self._mapping.from_joints(q).tolist(), strict=True))
