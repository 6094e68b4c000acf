"""What the terminal shows while a policy drives an arm: rates, latency, missed deadlines, servos, fault."""

from __future__ import annotations

import time
from types import TracebackType

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from vla.robot_drivers import Arm, Mode
from vla.robot_drivers.cameras import Cameras
from vla.runtime.robot.control_loop import ControlLoop
from vla.runtime.robot.dry_arm import in_words
from vla.runtime.robot.preflight import HOTTEST

REFRESH = 4  # Hz
LINE_EVERY = 2.0  # s between lines where there is no terminal
MODE_COLOURS = {Mode.TRACK: "green", Mode.HOLD: "yellow", Mode.FAULT: "bold red", Mode.LOST: "bold red"}


class TerminalView:
    """Shows a running `ControlLoop`; a context manager.

    On a terminal the picture is drawn anew, elsewhere a line is printed every `LINE_EVERY` seconds, by
    `tick`, which the caller calls once per control period.
    """

    def __init__(self, loop: ControlLoop, arm: Arm, cameras: Cameras, console: Console):
        self._loop, self._arm, self._cameras, self._console = loop, arm, cameras, console
        self._live: Live | None = None
        self._said = 0.0

    def __enter__(self) -> TerminalView:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self.picture, console=self._console, refresh_per_second=REFRESH)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def tick(self) -> None:
        """Print a line if there is no terminal and it is time for one."""
        now = time.monotonic()
        if self._live is None and now - self._said >= LINE_EVERY:
            self._said = now
            self._console.print(self.line(), highlight=False, markup=False, soft_wrap=True)

    def line(self) -> str:
        """Return the state of the run in one line."""
        status, cycle = self._loop.status, self._loop.status.cycle
        if cycle is None:
            return "starting"
        hottest = ""
        if cycle.state is not None and cycle.state.temperature is not None:
            hottest = f", {cycle.state.temperature.max():.0f} °C"
        fault = f", FAULT: {cycle.fault}" if cycle.fault is not None else ""
        return (
            f"{now_since(status.began):6.1f} s  {cycle.mode.value}, control {status.rate:.1f} Hz"
            f" ({status.missed} missed), policy {milliseconds(status.latency, 50)} ms,"
            f" arm {self._arm.timing.rate:.0f} Hz ({self._arm.timing.missed} missed){hottest}{fault}"
        )

    def picture(self) -> Group:
        """Return the whole picture."""
        return Group(self._rates(), self._servos(), self._last_words())

    def _rates(self) -> Table:
        status, timing, contract = self._loop.status, self._arm.timing, self._loop.contract
        wanted, arm_rate = (
            contract.interface.control_rate,
            self._arm.config.rate or self._arm.info.control_rate,
        )
        periods = np.diff(list(status.begins))
        shown = Table.grid(padding=(0, 2))
        shown.add_row("[bold]task", escape(self._loop.task), "", f"{now_since(status.began):.0f} s")
        shown.add_row(
            "[bold]control",
            f"{status.rate:.1f} of {wanted:g} Hz",
            f"period p99 {milliseconds(periods, 99)} ms, work p99 {milliseconds(status.work, 99)} ms",
            f"{warn(status.missed)} missed, {status.starved} without a plan",
        )
        shown.add_row(
            "[bold]policy",
            f"{milliseconds(status.latency, 50)} ms, p99 {milliseconds(status.latency, 99)} ms",
            f"the newest answer took {status.delay} periods",
            f"{status.queries} asked, {warn(status.late)} too late",
        )
        shown.add_row(
            "[bold]arm",
            f"{timing.rate:.1f} of {arm_rate:g} Hz",
            f"period p99 {timing.period_p99:.1f} ms, work p99 {timing.work_p99:.1f} ms",
            f"{warn(timing.missed)} missed",
        )
        now = time.monotonic()
        for name, frame in self._cameras.latest().items():
            age = "no picture" if frame is None else f"{1e3 * frame.age(now):.0f} ms old"
            allowed = f"allowed {1e3 * self._loop.max_frame_age:.0f} ms"
            shown.add_row(f"[bold]camera {name}", f"{self._cameras.threads[name].rate:.1f} Hz", age, allowed)
        return shown

    def _servos(self) -> Table:
        cycle, joints = self._loop.status.cycle, self._arm.info.joints
        shown = Table()
        for column in ("joint", "measured", "sent", "°C", "V", "filter"):
            shown.add_column(column, justify="left" if column in ("joint", "filter") else "right")
        if cycle is None or cycle.state is None:
            return shown
        state = cycle.state
        for i, joint in enumerate(joints):
            heat = "" if state.temperature is None else f"{state.temperature[i]:.0f}"
            hot = state.temperature is not None and state.temperature[i] > HOTTEST
            shown.add_row(
                joint.name,
                in_words(state.q[i], joint.unit),
                "" if cycle.sent is None else in_words(cycle.sent[i], joint.unit),
                f"[bold red]{heat}[/]" if hot else heat,
                "" if state.voltage is None else f"{state.voltage[i]:.1f}",
                escape(cycle.interventions.get(joint.name, "")),
            )
        return shown

    def _last_words(self) -> str:
        cycle = self._loop.status.cycle
        if cycle is None:
            return "starting"
        mode = f"[{MODE_COLOURS.get(cycle.mode, 'white')}]{cycle.mode.value}[/]"
        refused = cycle.interventions.get("setpoint")
        words = [mode, "no fault" if cycle.fault is None else f"[bold red]{escape(str(cycle.fault))}[/]"]
        words += [f"[yellow]{escape(refused)}[/]"] if refused else []
        words += [f"[yellow]{escape(self._arm.recording)}[/]"] if self._arm.recording else []
        return "  ".join([*words, "Ctrl-C brings the arm to rest"])


def milliseconds(seconds, percentile: float) -> str:
    """Return a percentile of durations in ms, or a dash if there are none."""
    values = list(seconds)
    return f"{1e3 * np.percentile(values, percentile):.0f}" if values else "–"


def now_since(began: float) -> float:
    """Return the seconds that have passed, 0 before the beginning."""
    return time.monotonic() - began if began else 0.0


def warn(count: int) -> str:
    """Return a count, in yellow if there is any."""
    return f"[yellow]{count}[/]" if count else "0"
