"""`vla serve`: a checkpoint answers over a websocket until it is told to end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from rich.console import Console

from vla.errors import UserError
from vla.evaluation.policy_source import SHIPPED_CHECKPOINT, CheckpointSource, ExpertSource
from vla.serving.experts import BY_INSTRUCTION, ExpertChoice, Experts
from vla.serving.server import Limits, PolicyServer, Served
from vla.serving.wire import MIB

if TYPE_CHECKING:
    from vla.evaluation.task_routed import NamedExpertSource
    from vla.experts.chosen_expert import ChosenExpert
    from vla.policy.checkpoint import LoadedPolicy
    from vla.runtime.engine import PolicyEngine

TOKEN_VARIABLE = "VLA_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeConfig:
    """Where a policy listens and what a client may take."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")] = SHIPPED_CHECKPOINT
    """Checkpoint folder, an expert, a bank or a merge too; the small one that ships if not given."""
    expert: str | None = None
    """Who acts of a bank or merge; by default the task router decides from a client's instruction."""
    task_router: str | None = None
    """Who decides that: language (the default), value_subspace or probe; none serves a merge as it is."""
    task_router_margin: float | None = None
    """Lead over the second expert below which a client gets a sentence; the router's own by default."""
    port: int = 8000
    """Port to listen on; 0 takes any free one and prints it."""
    host: str = "127.0.0.1"
    """Address to listen on: this machine alone. 0.0.0.0 is every network it is in; give a token then."""
    token: str | None = None
    """What clients must send as their API key. Better kept in the environment variable VLA_TOKEN."""
    device: str | None = None
    """``cpu`` or ``cuda``; the accelerator if there is one."""
    engine: str | None = None
    """Answer through the runtime engine; auto takes its fastest mode that changes actions by under 1 %."""
    task: str | None = None
    """Instruction for clients that send none."""
    rename: tuple[str, ...] = ()
    """Observation keys of existing clients, as CLIENT=OURS, for example observation/wrist_image=image2."""
    max_message_mib: float = 32.0
    """Largest message of a client, MiB."""
    max_clients: int = 8
    """Connections at a time."""
    idle_timeout: float = 600.0
    """Seconds after which a client that asks nothing is sent away."""


def serve_checkpoint(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM, both of which end it cleanly.

    Raises `UserError` for a checkpoint that cannot be loaded or a port that cannot be had.
    """
    limits = Limits(
        message=int(config.max_message_mib * MIB), clients=config.max_clients, idle=config.idle_timeout
    )
    console = Console(stderr=True, highlight=False)
    token = config.token or os.environ.get(TOKEN_VARIABLE)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    choice = ExpertChoice(config.expert, config.task_router, config.task_router_margin)
    source = choice.source(config.checkpoint)
    served = serve_experts(config, choice) if source is None else serve_source(source, config, say)

    def ready(port: int) -> None:
        host = f"[{config.host}]" if ":" in config.host else config.host
        say(f"Serving {served.identity['checkpoint']['label']} at ws://{host}:{port}. Ctrl-C ends it.")

    server = PolicyServer(served, token=token, limits=limits, report=say)
    if token is None and config.host not in LOOPBACK:
        say(f"Anyone who reaches {config.host} can use this policy: set {TOKEN_VARIABLE}.")
    asyncio.run(_until_signalled(server, config.host, config.port, ready))
    say("The policy server has ended.")


def serve_source(
    source: CheckpointSource | ExpertSource | NamedExpertSource,
    config: ServeConfig,
    say: Callable[[str], None] = lambda line: None,
) -> Served:
    """Load the checkpoint, make its engine ready, and say who it is."""
    identity: dict[str, Any] = {"checkpoint": {"label": source.label, "sha256": source.hash}}
    if config.engine is not None:
        say("Making the engine ready: where torch's compiler comes in, the first time takes minutes.")
    loaded = load_answering(source, config.device, config.engine)
    if config.engine is not None:
        seconds = loaded.warm_up(config.task)
        identity["engine"] = loaded.mode
        say(f"The engine answers in mode {loaded.mode}, in {seconds * 1e3:.1f} ms.")
    return Served(
        make_policy=lambda: ClientPolicy(loaded),
        contract=source.contract,
        identity=identity,
        task=config.task,
        rename=parse_rename(config.rename),
    )


def serve_experts(config: ServeConfig, choice: ExpertChoice) -> Served:
    """Load a bank or a merge, of which every client gets the expert that its instruction asks for.

    Raises `UserError` as `Experts.open` does.
    """
    experts = Experts.open(config.checkpoint, choose_device(config.device), config.engine, choice)
    who = {"experts": list(experts.policy.names), "task_router": choice.router or BY_INSTRUCTION}
    return Served(
        make_policy=lambda: ClientExpert(experts),
        contract=experts.contract,
        identity={**experts.identity, **who},
        task=config.task,
        rename=parse_rename(config.rename),
    )


def load_answering(
    source: CheckpointSource | ExpertSource | NamedExpertSource, device: str | None, engine: str | None
) -> LoadedPolicy | PolicyEngine:
    """Load a checkpoint or an expert, behind the runtime engine in mode `engine` if one is named.

    Raises `UserError` for a folder that cannot be loaded, no such device or no such mode.
    """
    loaded = source.load_onto(choose_device(device))
    if engine is None:
        return loaded
    from vla.runtime.engine import PolicyEngine

    return PolicyEngine(loaded, engine)


class ClientPolicy:
    """A checkpoint as one client sees it: shared weights, random numbers of its own.

    A policy that samples gives a client the same actions whether or not others ask in between.
    """

    def __init__(self, loaded: LoadedPolicy | PolicyEngine | ChosenExpert):
        self._loaded = loaded
        self._random: tuple = ()

    def reset(self, seed: int) -> None:
        """Begin this client's random numbers at `seed`."""
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._random = _random_state()

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """Ask the network once, (K, D) float32."""
        import torch

        with torch.random.fork_rng():
            cpu, accelerators = self._random
            torch.set_rng_state(cpu)
            if accelerators:
                torch.cuda.set_rng_state_all(accelerators)
            actions = self._loaded.act(images, state, instruction)
            self._random = _random_state()
        return actions


class ClientExpert(ClientPolicy):
    """One of several experts as one client sees it: chosen for every instruction, and anew after a reset."""

    def __init__(self, experts: Experts):
        super().__init__(experts.chooser())
        self._experts = experts
        self._instruction: str | None = None

    def reset(self, seed: int) -> None:
        """See `ClientPolicy.reset`; a router that looks will look again."""
        super().reset(seed)
        self._loaded = self._experts.chooser()

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """See `ClientPolicy.act`. Raises `UserError` where the router cannot tell who is meant."""
        if instruction != self._instruction:
            self._loaded, self._instruction = self._experts.chooser(), instruction
        return super().act(images, state, instruction)


def _random_state() -> tuple:
    import torch

    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def choose_device(name: str | None) -> str:
    """Return `name`, or the accelerator if there is one. Raises `UserError` if it is not there."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu.")
    return name


def parse_rename(pairs: tuple[str, ...]) -> dict[str, str]:
    """Read CLIENT=OURS pairs. Raises `UserError` for anything else."""
    rename = {}
    for pair in pairs:
        theirs, equals, ours = pair.partition("=")
        if not (theirs and equals and ours):
            raise UserError(
                f"--rename {pair} is not CLIENT=OURS, for example observation/wrist_image=image2."
            )
        rename[theirs] = ours
    return rename


async def _until_signalled(server: PolicyServer, host: str, port: int, ready) -> None:
    stop = asyncio.Event()
    with _signals_set(stop):
        await server.run(host, port, stop, ready)


@contextmanager
def _signals_set(stop: asyncio.Event):
    """Let SIGINT and SIGTERM set `stop` while the block runs."""
    loop = asyncio.get_running_loop()
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.getsignal(number)
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number, handler in previous.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
