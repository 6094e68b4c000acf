"""The run in the Rerun viewer: what the cameras saw, where the joints are, how long the policy took.

cameras/<name>            the pictures that the policy was shown
joints/<name>/measured    and /sent (after the safety filter), /asked (by the policy), in the arm's units
policy/latency_ms         of every answer
task                      in words
"""

from __future__ import annotations

from collections.abc import Mapping

from vla.contract import IMAGE_PREFIX
from vla.errors import UserError
from vla.robot_drivers import Cycle, DriverInfo
from vla.runtime.chunk_scheduling import Query
from vla.runtime.robot.policy_thread import Answer, Observation


class RerunView:
    """A listener of the control loop. Opens the viewer; raises `UserError` if Rerun is not installed.

    `spawn` False logs to whatever recording the program has set up.
    """

    def __init__(self, task: str, info: DriverInfo, *, spawn: bool = True):
        try:
            import rerun
        except ImportError:
            raise UserError("--rerun needs the viewer: pip install 'lerobot_policy_cogmerge[viz]'.") from None
        self._rerun, self._info = rerun, info
        if spawn:
            rerun.init("vla run", spawn=True)
        rerun.log("task", rerun.TextDocument(task), static=True)

    def observed(self, query: Query, observation: Observation) -> None:
        """Show what the policy is shown."""
        self._at(query.time)
        for key, image in observation.images.items():
            self._rerun.log(f"cameras/{key.removeprefix(IMAGE_PREFIX)}", self._rerun.Image(image))

    def answered(self, answer: Answer) -> None:
        """Show how long it took."""
        self._at(answer.query.time + answer.seconds)
        self._rerun.log("policy/latency_ms", self._rerun.Scalars(1e3 * answer.seconds))

    def asked_arm(self, now: float, setpoint: Mapping[str, float], cycle: Cycle) -> None:
        """Show asked, sent and measured of every joint."""
        self._at(now)
        for i, name in enumerate(self._info.joint_names):
            values = {
                "asked": setpoint[name],
                "measured": cycle.state.q[i],
                "sent": None if cycle.sent is None else cycle.sent[i],
            }
            for what, value in values.items():
                if value is not None:
                    self._rerun.log(f"joints/{name}/{what}", self._rerun.Scalars(float(value)))

    def _at(self, now: float) -> None:
        self._rerun.set_time("run", duration=now)
