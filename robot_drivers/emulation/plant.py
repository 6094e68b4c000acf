"""The SO101 as a mechanism: MuJoCo bodies driven by emulated servos.

A `MotorServo` follows the trapezoid of its registers with a motor of limited torque; the `Plant` turns that
into a force on the joint, lets MuJoCo move the arm, and gives back what a servo can sense: position,
velocity, load, current, temperature. An arm whose servos have no torque falls.

    force = clip(kp (aim - q) - kv dq/dt, -share τ_stall, share τ_stall),   share = TORQUE_LIMIT / 1000

with kp, kv and τ_stall of ``so101.xml``. A servo in overload keeps ``PROTECTIVE_TORQUE`` of its torque.
Assumed, and not identified on hardware: those constants, the current that a load draws, and the winding's
temperature, a first-order lag of what the square of the load would heat it to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np

from ..so101 import registers as r
from ..so101.calibration import JOINTS, Calibration, JointCalibration
from .servo import EmulatedServo

MODEL = Path(__file__).with_name("so101.xml")
CENTRE = 2048
"""Steps of the encoder where the model's joint angle is zero."""

STEPS_PER_RADIAN = r.STEPS_PER_TURN / (2 * math.pi)
SUBSTEP = 0.002  # s, about what MuJoCo integrates at a time
JAM_DAMPING = 1e4  # N·m·s/rad; dry friction would creep

STALL_CURRENT = 2.7  # A
AMPERES_PER_UNIT = 0.0065
AMBIENT, STALL_HEATING, HEATING_TIME = 30.0, 60.0, 300.0  # °C, °C above ambient at full load, s


def to_steps(angle: float) -> float:
    """Return the encoder's steps at a joint angle of the model (rad)."""
    return CENTRE + angle * STEPS_PER_RADIAN


def to_angle(steps: float) -> float:
    """Return the model's joint angle (rad) at an encoder position."""
    return (steps - CENTRE) / STEPS_PER_RADIAN


@dataclass
class MotorServo(EmulatedServo):
    """A servo whose joint is moved by a motor instead of by decree. `aim` (steps) is where it pulls to."""

    aim: float = float(CENTRE)
    warmth: float = AMBIENT

    def command(self, dt: float) -> tuple[float, float]:
        """Return where to pull (steps) and with what share of the stall torque, for the next `dt` seconds."""
        if not self.protect():
            self.aim, self._pace = self.encoder, 0.0
            return self.aim, 0.0
        self.aim, self._pace = self.advance(self.aim, self._pace, dt)
        share = self.get(r.TORQUE_LIMIT) / 1000
        return self.aim, min(share, self.get(r.PROTECTIVE_TORQUE) / 100) if self._overloaded else share

    def feel(self, encoder: float, velocity: float, load: float, dt: float) -> None:
        """Take in what the joint did in the last `dt` seconds: steps, steps/s, share of the stall torque."""
        self.encoder, self.velocity = encoder, velocity
        self.strain(dt, load)
        self.put(r.PRESENT_CURRENT, round(abs(load) * STALL_CURRENT / AMPERES_PER_UNIT))
        if round(self.warmth) != self.temperature:  # somebody set it from outside
            self.warmth = float(self.temperature)
        self.warmth += (AMBIENT + STALL_HEATING * load**2 - self.warmth) * dt / HEATING_TIME
        self.temperature = round(self.warmth)

    def _boot(self) -> None:
        self._pace = 0.0  # steps/s of `aim`
        super()._boot()


class Plant:
    """The joints of an SO101 in `model` and `data`, driven by six servos in the order of `JOINTS`.

    `model` holds the joints and actuators of ``so101.xml``, alone or in a larger scene.
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, servos: Sequence[MotorServo]):
        if len(servos) != len(JOINTS):
            raise ValueError(f"an SO101 has {len(JOINTS)} servos, got {len(servos)}")
        self.model, self.data, self.servos = model, data, list(servos)
        self.payload = 0.0  # kg between the jaws
        self._qpos = [int(model.joint(name).qposadr[0]) for name in JOINTS]
        self._dof = [int(model.joint(name).dofadr[0]) for name in JOINTS]
        self._actuator = [model.actuator(name).id for name in JOINTS]
        self._gain = model.actuator_gainprm[self._actuator].copy()
        self._bias = model.actuator_biasprm[self._actuator].copy()
        self._damping = model.dof_damping[self._dof].copy()
        self._stall = float(model.actuator_forcerange[self._actuator[0], 1])
        self.sense()

    def pose(self, angles: Sequence[float]) -> None:
        """Put the joints at `angles` (6,) rad, at rest; energised servos hold them there."""
        self.data.qpos[self._qpos] = angles
        self.data.qvel[self._dof] = 0.0
        mujoco.mj_forward(self.model, self.data)
        self.sense()
        for servo in self.servos:
            servo.aim, servo._pace = servo.encoder, 0.0
            servo.put(r.GOAL_POSITION, round(servo.encoder) - servo.get(r.HOMING_OFFSET))

    def _carry(self) -> None:
        """Let `payload` pull at the point between the jaws."""
        site = self.model.site("grasp").id
        body = int(self.model.site_bodyid[site])
        force = self.payload * self.model.opt.gravity
        arm = self.data.site_xpos[site] - self.data.xipos[body]
        self.data.xfrc_applied[body] = np.concatenate([force, np.cross(arm, force)])

    @property
    def height(self) -> float:
        """Metres from the table to the point between the jaws."""
        return float(self.data.site("grasp").xpos[2])

    def angles(self) -> np.ndarray:
        """Return the joint angles of the model, (6,) rad."""
        return self.data.qpos[self._qpos].copy()

    def sense(self) -> None:
        """Let the encoders see where the joints are."""
        for servo, angle in zip(self.servos, self.data.qpos[self._qpos].tolist(), strict=True):
            servo.encoder = to_steps(angle)

    def tick(self, dt: float) -> None:
        """Let `dt` seconds pass."""
        for i, servo in enumerate(self.servos):
            self._pull(i, *servo.command(dt), servo.jammed)
        self._carry()
        substeps = max(1, round(dt / SUBSTEP))
        self.model.opt.timestep = dt / substeps
        mujoco.mj_step(self.model, self.data, substeps)
        angles = self.data.qpos[self._qpos].tolist()
        speeds = self.data.qvel[self._dof].tolist()
        forces = self.data.actuator_force[self._actuator].tolist()
        for servo, angle, speed, force in zip(self.servos, angles, speeds, forces, strict=True):
            servo.feel(to_steps(angle), speed * STEPS_PER_RADIAN, force / self._stall, dt)

    def _pull(self, i: int, aim: float, share: float, jammed: bool) -> None:
        """Set the actuator of joint `i`; without torque it has neither stiffness nor damping."""
        actuator, on = self._actuator[i], share > 0
        self.model.actuator_gainprm[actuator] = self._gain[i] * on
        self.model.actuator_biasprm[actuator] = self._bias[i] * on
        self.model.actuator_forcerange[actuator] = -share * self._stall, share * self._stall
        self.model.dof_damping[self._dof[i]] = JAM_DAMPING if jammed else self._damping[i]
        self.data.ctrl[actuator] = to_angle(aim)


def emulated_calibration(model: mujoco.MjModel) -> Calibration:
    """Return the calibration of the emulated arm: zero at the model's zero, limits at the joints' limits."""
    calibration = {}
    for id, name in enumerate(JOINTS, 1):
        low, high = (to_steps(angle) for angle in model.joint(name).range)
        calibration[name] = JointCalibration(id, 0, 0, math.ceil(low), math.floor(high))
    return calibration


def motor_servos(calibration: Calibration) -> list[MotorServo]:
    """Return the six servos of an arm that has been calibrated."""
    return [
        MotorServo(it.id, eeprom={name: it.eeprom[r.BY_NAME[name]] for name in _CALIBRATED})
        for it in (calibration[name] for name in JOINTS)
    ]


_CALIBRATED = ("HOMING_OFFSET", "MIN_POSITION_LIMIT", "MAX_POSITION_LIMIT")
