"""The light client: a policy that lives on another machine.

Needs numpy, websockets and msgpack; no torch, so that it runs on the small computer beside an arm.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from vla.contract import ContractError, PolicyContract
from vla.errors import UserError
from vla.serving.wire import MIB, WireError, decode, encode, require_token

STATE_KEY = "observation.state"
LARGEST_REPLY = 64 * MIB


class ServerLost(UserError):
    """The server is not there, not there any more, or silent for too long."""


class ServerRefused(UserError):
    """The server answered that it will not: the message is its sentence."""


class RemotePolicy:
    """A policy behind ``ws://host:port``; a context manager. Used by one thread at a time.

    `reply_timeout` (s) bounds every call but the first for an instruction, for which a server may have to
    build what it then keeps: that has `first_reply_timeout` (s), and on an arm comes before it moves. Raises
    `ServerLost` if there is no server, `ServerRefused` if the token is not the one it wants, `ContractError`
    if it is no CogMerge server.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        connect_timeout: float = 10.0,
        reply_timeout: float = 5.0,
        first_reply_timeout: float = 120.0,
    ):
        self.url = url if "://" in url else f"ws://{url}"
        self._timeout = reply_timeout
        self._first_timeout = max(reply_timeout, first_reply_timeout)
        self._answered: str | None = None  # the instruction of the last answer
        self._stack = ExitStack()
        self._connection = self._connect(require_token(token), connect_timeout)
        try:
            #: What the server says of itself, with the contract as a map.
            self.metadata: dict[str, Any] = self._receive(connect_timeout)
            if not isinstance(self.metadata, dict) or "contract" not in self.metadata:
                raise ContractError(
                    f"{self.url} serves a policy that has no contract; connect to a `vla serve`."
                )
            self.contract = PolicyContract.from_dict(
                self.metadata["contract"], f"The contract sent by {self.url}"
            )
        except UserError:
            self.close()
            raise

    def reset(self, seed: int) -> None:
        """Begin a new episode; draw whatever is random from `seed`."""
        self._ask({"reset": seed}, self._timeout)

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """Return one chunk of actions (K, D) float32.

        `images` maps each camera's key or short name to (H, W, 3) uint8. Raises `ServerRefused` with the
        server's sentence for an observation that does not fit the contract.
        """
        timeout = self._timeout if instruction == self._answered else self._first_timeout
        observation = {**images, STATE_KEY: np.asarray(state, np.float32), "prompt": instruction}
        reply = self._ask(observation, timeout)
        actions = reply.get("actions") if isinstance(reply, dict) else None
        need = self.contract
        promised = (need.chunk_size, need.interface.action.dim)
        if not isinstance(actions, np.ndarray) or actions.dtype.kind != "f" or actions.shape != promised:
            raise ServerRefused(f"{self.url} answered without the actions that its contract promises.")
        self._answered = instruction
        return actions.astype(np.float32)

    def close(self) -> None:
        """Leave. Idempotent."""
        self._stack.close()

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _connect(self, token: str | None, timeout: float) -> ClientConnection:
        try:
            opening = connect(
                self.url,
                additional_headers={"Authorization": f"Api-Key {token}"} if token else None,
                compression=None,
                max_size=LARGEST_REPLY,
                open_timeout=timeout,
                close_timeout=1.0,
                proxy=None,  # a control loop does not belong behind a web proxy
            )
            connection = self._stack.enter_context(opening)
        except InvalidStatus as error:
            sentence = (error.response.body or b"").decode(errors="replace").strip()
            raise ServerRefused(
                sentence or f"{self.url} refused the connection ({error.response.status_code})."
            ) from None
        except InvalidURI:
            raise ServerRefused(f"'{self.url}' is not an address; write ws://HOST:PORT.") from None
        except (OSError, TimeoutError, WebSocketException) as error:
            raise ServerLost(
                f"There is no policy server at {self.url} ({error}); start one with `vla serve`."
            ) from None
        # A server that is frozen takes no more bytes: without this, `send` would wait for ever.
        seconds = struct.pack("ll", int(self._timeout), int(self._timeout % 1 * 1e6))
        with suppress(OSError):  # closed already; what the server left behind says why, and is read next
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        return connection

    def _ask(self, message: Any, timeout: float) -> Any:
        try:
            self._connection.send(encode(message))
        except ConnectionClosed as error:
            raise self._lost(error) from None
        return self._receive(timeout)

    def _receive(self, timeout: float) -> Any:
        try:
            reply = self._connection.recv(timeout)
        except TimeoutError:
            self.close()  # a late reply must not be taken for the next one
            raise ServerLost(f"{self.url} did not answer within {timeout:g} s.") from None
        except ConnectionClosed as error:
            raise self._lost(error) from None
        if isinstance(reply, str):
            raise ServerRefused(reply)
        try:
            return decode(reply)
        except WireError as error:
            raise ServerRefused(f"{self.url} answered what cannot be read: {error}") from None

    def _lost(self, error: ConnectionClosed) -> ServerLost:
        why = error.rcvd.reason if error.rcvd and error.rcvd.reason else str(error)
        return ServerLost(f"The connection to {self.url} is lost: {why}.")
