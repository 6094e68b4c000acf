"""The websocket server: many clients, one policy, one request in the machine at a time.

On connecting a client receives the metadata, with the contract. Then every binary message is answered by
one binary message, or by one *text* message that says in a sentence why not; openpi's client raises it.
A refused observation leaves the connection open, an unreadable message closes it. ``/healthz`` answers
``OK`` to a plain HTTP request.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Request, Response, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from vla import __version__
from vla.contract import PolicyContract
from vla.errors import UserError
from vla.serving.session import Policy, Session
from vla.serving.wire import MIB, WireError, decode, encode, require_token

METADATA_VERSION = 1
HEALTH_PATH = "/healthz"


@dataclass(frozen=True)
class Limits:
    """What a client may take. Times in seconds."""

    message: int = 32 * MIB
    """Bytes of one message; a larger one closes the connection before it is read."""
    clients: int = 8
    """Connections at a time."""
    handshake: float = 10.0
    silence: float = 20.0
    """A client whose machine does not answer a ping for this long is gone."""
    idle: float = 600.0
    """A client that asks nothing for this long makes room for others."""

    def __post_init__(self):
        if self.message < 1 or self.clients < 1 or min(self.handshake, self.silence, self.idle) <= 0:
            raise UserError(f"{self} cannot work: every limit must be positive.")


@dataclass(frozen=True)
class Served:
    """What is offered. `make_policy` gives every client its own; `identity` is shown in the metadata."""

    make_policy: Callable[[], Policy]
    contract: PolicyContract
    identity: Mapping[str, Any]
    task: str | None = None
    rename: Mapping[str, str] | None = None


class PolicyServer:
    """Serves one policy. `token` (None: open to all) is what clients must send as ``Api-Key``.

    `report` receives one line for each client that comes or goes.
    """

    def __init__(
        self,
        served: Served,
        *,
        token: str | None = None,
        limits: Limits | None = None,
        report: Callable[[str], None] = lambda line: None,
    ):
        self.served, self.limits = served, limits or Limits()
        self._token, self._report = require_token(token), report
        self._clients = 0
        self._metadata = encode(
            {
                "contract": served.contract.as_dict(),
                "server": f"cogmerge {__version__}",
                "metadata_version": METADATA_VERSION,
                **served.identity,
            }
        )

    async def run(self, host: str, port: int, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
        """Serve until `stop` is set; call `ready` with the port once clients can connect.

        A request that is being computed at the end is finished first. Raises `UserError` if the port
        cannot be had.
        """
        with ThreadPoolExecutor(1, "policy") as self._worker:
            try:
                server = await serve(
                    self._serve_client,
                    host,
                    port,
                    process_request=self._admit,
                    compression=None,
                    max_size=self.limits.message,
                    open_timeout=self.limits.handshake,
                    ping_interval=self.limits.silence,
                    ping_timeout=self.limits.silence,
                )
            except OSError as error:
                raise UserError(
                    f"Port {port} on {host} cannot be served on ({error.strerror or error}); choose another"
                    " with --port."
                ) from None
            async with server:
                ready(server.sockets[0].getsockname()[1])
                await stop.wait()
                server.close(code=CloseCode.GOING_AWAY, reason="the server is ending")

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a health check; turn away who lacks the token and who comes when it is full."""
        if request.path == HEALTH_PATH:
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self._token is not None and not self._knows_token(request):
            self._report(f"{_name(connection)} was turned away: no valid token")
            return connection.respond(
                HTTPStatus.UNAUTHORIZED, "This policy server wants a token: send it as api_key or --token.\n"
            )
        if self._clients >= self.limits.clients:
            self._report(f"{_name(connection)} was turned away: {self.limits.clients} clients already")
            return connection.respond(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"This policy server has {self.limits.clients} clients already; try again later.\n",
            )
        return None

    def _knows_token(self, request: Request) -> bool:
        sent = request.headers.get_all("Authorization")
        known = [f"{scheme} {self._token}".encode() for scheme in ("Api-Key", "Bearer")]
        return len(sent) == 1 and any(
            [hmac.compare_digest(sent[0].encode(), one) for one in known]  # a list: always both, same time
        )

    async def _serve_client(self, connection: ServerConnection) -> None:
        """Converse with one client until it leaves."""
        self._clients += 1
        self._report(f"{_name(connection)} connected ({self._clients} in all)")
        try:
            await connection.send(self._metadata)
            await self._converse(connection)
        except ConnectionClosed:
            pass  # how a conversation ends
        finally:
            self._clients -= 1
            self._report(f"{_name(connection)} left ({self._clients} remain)")

    async def _converse(self, connection: ServerConnection) -> None:
        session = await self._compute(self._make_session)
        previous = None
        while True:
            try:
                message = await asyncio.wait_for(connection.recv(), self.limits.idle)
            except TimeoutError:
                await connection.close(CloseCode.NORMAL_CLOSURE, f"idle for {self.limits.idle:g} s")
                return
            begin = time.perf_counter()
            try:
                if isinstance(message, str):
                    raise WireError("The message is text; send msgpack as a binary message.")
                reply, seconds = await self._compute(_timed, session, message)
            except UserError as error:
                await connection.send(str(error))
                if isinstance(error, WireError):
                    await connection.close(CloseCode.INVALID_DATA, "unreadable message")
                    return
                continue
            timing = {"infer_ms": seconds * 1e3}
            if previous is not None:
                timing["prev_total_ms"] = previous * 1e3
            await connection.send(encode(reply | {"server_timing": timing}))
            previous = time.perf_counter() - begin

    def _make_session(self) -> Session:
        served = self.served
        return Session(served.make_policy(), served.contract, task=served.task, rename=served.rename)

    async def _compute(self, function: Callable, *arguments: Any) -> Any:
        """Run in the one thread that owns the policy; the event loop goes on answering pings."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)


def _timed(session: Session, message: bytes) -> tuple[dict[str, Any], float]:
    """Decode and answer; return the reply and the seconds it took."""
    begin = time.perf_counter()
    reply = session.answer(decode(message))
    return reply, time.perf_counter() - begin


def _name(connection: ServerConnection) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if address else "a client"
