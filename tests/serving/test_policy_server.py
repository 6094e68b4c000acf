"""The server from outside: openpi's own client, our client, and clients that misbehave."""

import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from served_policy import CHUNK, EchoPolicy, arm_contract, observation, running_server
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.sync.server import serve

from vla.contract import ContractError, PolicyContract
from vla.serving.client import RemotePolicy, ServerLost, ServerRefused
from vla.serving.server import Limits
from vla.serving.wire import WireError, decode, encode

# openpi's client connects in a way that websockets 17 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")


@pytest.fixture
def openpi():
    """Connect openpi's client, which has no way to leave: its connections are closed at the end."""
    clients = []

    def make(port, **options):
        clients.append(WebsocketClientPolicy("127.0.0.1", port, **options))
        return clients[-1]

    yield make
    for client in clients:
        client._ws.close()


def remote(port, **options):
    return RemotePolicy(f"ws://127.0.0.1:{port}", **options)


def ask(policy, value=7, prompt="pick up the cube"):
    """Ask our client for the actions of `observation(value)`."""
    images = observation(value)
    state = images.pop("observation.state")
    images.pop("prompt")
    return policy.act(images, state, prompt)


@contextmanager
def server_that_says(message):
    """A WebSocket server that sends `message` to whoever connects and hangs up; yields its port."""
    with serve(lambda connection: connection.send(encode(message)), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.socket.getsockname()[1]
        server.shutdown()


@pytest.fixture(scope="module")
def port():
    with running_server() as port:
        yield port


def test_openpis_client_is_told_the_contract_and_answered(port, openpi):
    client = openpi(port)
    contract = PolicyContract.from_dict(client.get_server_metadata()["contract"], "The metadata")
    assert contract.as_dict() == arm_contract().as_dict()
    for call in (1, 2):
        reply = client.infer(observation(10))
        assert reply["actions"].shape == (CHUNK, 6) and reply["actions"].dtype == np.float32
        assert reply["actions"][0].tolist() == [0, call, 10, 11, 15, 4]
        assert reply["actions"][3, 5] == 7
    assert reply["server_timing"]["infer_ms"] >= 0 and "prev_total_ms" in reply["server_timing"]


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(".", "/"),
        lambda key: key.replace("observation.images.", "observation/"),
        lambda key: key.rsplit(".", 1)[-1],
    ],
)
def test_the_names_of_openpis_examples_are_understood(port, rename, openpi):
    message = {rename(key): value for key, value in observation(3).items()}
    assert openpi(port).infer(message)["actions"][0, 2:4].tolist() == [3, 4]


def test_nested_observations_and_plain_lists_are_understood(port, openpi):
    flat = observation(3)
    message = {
        "images": {"top": flat["observation.images.top"], "wrist": flat["observation.images.wrist"]},
        "state": [0, 1, 2, 3, 4, 5],
        "task": "close the drawer now please",
    }
    assert openpi(port).infer(message)["actions"][0].tolist() == [0, 1, 3, 4, 15, 5]


def test_keys_of_existing_clients_can_be_renamed(openpi):
    with running_server(rename={"observation/wrist_image": "wrist"}, task="push") as port:
        message = observation(5, prompt=None)
        message["observation/wrist_image"] = message.pop("observation.images.wrist")
        assert openpi(port).infer(message)["actions"][0, 3:].tolist() == [6, 15, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"observation.images.top": None}, "lacks camera 'observation.images.top': send 'top'"),
        (
            {"observation.images.top": np.zeros((3, 6, 8), np.uint8)},
            r"sent uint8 \(3, 6, 8\), the policy expects uint8 \(6, 8, 3\)",
        ),
        ({"observation.images.top": np.zeros((6, 8, 3), np.float32)}, r"sent float32 \(6, 8, 3\)"),
        ({"observation.images.top": "a picture"}, "sent text of 9 characters"),
        ({"observation.state": None}, "lacks the state"),
        ({"observation.state": np.zeros(7)}, r"shape \(7,\), the policy expects 6 entries \(shoulder_pan"),
        ({"observation.state": np.array([0, 1, np.nan, 3, 4, np.inf])}, "not finite at elbow_flex, gripper"),
        ({"observation.state": ["a"] * 6}, "not a list of numbers"),
        ({"prompt": None}, "no instruction"),
        ({"prompt": ""}, "send the task in words"),
        ({"prompt": 5}, "'prompt' is a int"),
        ({"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}, "nested more than 4 maps deep"),
        ({"top": np.zeros((6, 8, 3), np.uint8)}, "has 'top' twice"),
    ],
)
def test_an_observation_that_does_not_fit_is_one_sentence_and_the_connection_lives(
    port, change, words, openpi
):
    client = openpi(port)
    message = {key: value for key, value in (observation() | change).items() if value is not None}
    with pytest.raises(RuntimeError, match=words) as refusal:
        client.infer(message)
    assert str(refusal.value).count("\n") == 1  # openpi puts its own line above ours
    assert client.infer(observation())["actions"][0, 1] == 1, "a refused observation is no call"


@pytest.mark.parametrize("data", [b"\xc1", encode([1]) + b"\0", "text"])
def test_an_unreadable_message_is_one_sentence_and_the_end(port, data):
    with connect(f"ws://127.0.0.1:{port}") as connection:
        connection.recv(10)
        connection.send(data)
        assert connection.recv(10).startswith("The message is ")
        with pytest.raises(ConnectionClosed):
            connection.recv(10)
        assert connection.close_code == 1007


def test_a_map_that_is_no_observation_is_refused(port):
    for message in ([1], 3, {}, {"reset": -1}, {"reset": "x"}, {b"top": 1}):
        with connect(f"ws://127.0.0.1:{port}") as connection:
            connection.recv(10)
            connection.send(encode(message))
            assert isinstance(connection.recv(10), str)
            connection.send(encode(observation()))
            assert "actions" in decode(connection.recv(10))


def test_every_client_has_its_own_state(port, openpi):
    with remote(port) as one, remote(port) as two:
        one.reset(11)
        two.reset(12)
        turns = [ask(client)[0, :2].tolist() for client in (one, two, one, one, two)]
        assert turns == [[11, 1], [12, 1], [11, 2], [11, 3], [12, 2]]
        one.reset(5)
        assert ask(one)[0, :2].tolist() == [5, 1] and ask(two)[0, :2].tolist() == [12, 3]
    client = openpi(port)
    client.infer(observation(prompt="one two"))
    assert client.infer(observation(prompt=None))["actions"][0, 5] == 2, "the instruction is remembered"
    with pytest.raises(RuntimeError, match="no instruction"):
        openpi(port).infer(observation(prompt=None))


def test_our_client_carries_the_contract_and_the_sentences(port):
    with remote(port) as policy:
        assert policy.contract == PolicyContract.from_dict(arm_contract().as_dict(), "here")
        assert policy.metadata["checkpoint"] == {"label": "echo"}
        with pytest.raises(ServerRefused, match=r"lacks camera 'observation\.images\.wrist'"):
            policy.act({"top": np.zeros((6, 8, 3), np.uint8)}, np.zeros(6), "push")
        assert ask(policy).shape == (CHUNK, 6)


def test_clients_at_the_same_time_all_get_their_own_answer():
    with running_server(lambda: EchoPolicy(0.01)) as port:
        wrong = []

        def converse(value):
            with remote(port) as policy:
                for call in range(1, 6):
                    if ask(policy, value)[0, 1:3].tolist() != [call, value]:
                        wrong.append(value)

        threads = [threading.Thread(target=converse, args=(value,)) for value in range(1, 6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not wrong


def test_a_token_is_asked_of_everybody(openpi):
    lines = []
    with running_server(token="sesame", lines=lines) as port:
        assert openpi(port, api_key="sesame").infer(observation())["actions"].shape == (CHUNK, 6)
        with remote(port, token="sesame") as policy:
            ask(policy)
        for token in (None, "Sesame", "sesame2"):
            with pytest.raises(ServerRefused, match="wants a token"):
                remote(port, token=token)
        for token in ("sesame ", "\u00e4", "a\nb", ""):
            with pytest.raises(WireError, match="plain letters"):
                remote(port, token=token)
        with pytest.raises(InvalidStatus):
            openpi(port)
    assert any("no valid token" in line for line in lines)


def test_a_message_that_is_too_large_ends_the_connection_with_the_reason():
    with running_server(limits=Limits(message=2000)) as port:
        with remote(port) as policy:
            ask(policy)
            with pytest.raises(ServerLost, match="2000 bytes"):
                policy.act({"top": np.zeros((60, 80, 3), np.uint8)}, np.zeros(6), "push")
        with remote(port) as policy:
            assert ask(policy).shape == (CHUNK, 6)


def test_no_more_clients_than_allowed():
    with running_server(limits=Limits(clients=1)) as port, remote(port) as first:
        with pytest.raises(ServerRefused, match="has 1 clients already"):
            remote(port)
        first.close()
        for _ in range(100):  # the place is free once the server has noticed
            try:
                with remote(port) as second:
                    ask(second)
                break
            except ServerRefused:
                time.sleep(0.02)
        else:
            pytest.fail("the place was never free again")


def test_an_idle_client_is_sent_away():
    with running_server(limits=Limits(idle=0.2)) as port, remote(port) as policy:
        time.sleep(0.6)
        with pytest.raises(ServerLost, match=r"idle for 0\.2 s"):
            ask(policy)


def test_a_policy_that_takes_too_long_is_a_lost_server():
    limits = {"reply_timeout": 0.1, "first_reply_timeout": 0.1}
    with running_server(lambda: EchoPolicy(0.5)) as port, remote(port, **limits) as policy:
        with pytest.raises(ServerLost, match=r"did not answer within 0\.1 s"):
            ask(policy)
        with pytest.raises(ServerLost):  # a late reply must not answer the next question
            ask(policy)


def test_the_first_answer_to_an_instruction_may_take_longer():
    """A server with a compiled engine builds the program of an instruction when it hears it."""
    with running_server(lambda: EchoPolicy(0.5)) as port, remote(port, reply_timeout=0.1) as policy:
        ask(policy)
        ask(policy, prompt="another one")
        with pytest.raises(ServerLost, match=r"did not answer within 0\.1 s"):
            ask(policy, prompt="another one")


def test_a_server_that_is_frozen_is_lost_even_when_it_takes_no_more_bytes():
    program = """
import asyncio, sys
from dataclasses import replace
sys.path.append(sys.argv[1])
from served_policy import EchoPolicy, arm_contract
from vla.contract import Camera
from vla.serving.server import PolicyServer, Served
contract = arm_contract()
big = replace(contract.interface, cameras=(Camera("observation.images.top", 3000, 3000),))
server = PolicyServer(Served(EchoPolicy, replace(contract, interface=big), {}))
asyncio.run(server.run("127.0.0.1", 0, asyncio.Event(), lambda port: print(port, flush=True)))
"""
    command = [sys.executable, "-P", "-c", program, str(Path(__file__).parent)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        policy = remote(int(server.stdout.readline()), reply_timeout=1.0, first_reply_timeout=1.0)
        server.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(ServerLost):
            policy.act({"top": np.zeros((3000, 3000, 3), np.uint8)}, np.zeros(6), "push")
        policy.close()
        assert time.monotonic() - begin < 15
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_a_policy_that_breaks_ends_its_own_connection_only():
    class Broken(EchoPolicy):
        def act(self, images, state, instruction):
            if instruction == "break":
                raise RuntimeError("a bug")
            return super().act(images, state, instruction)

    with running_server(Broken) as port, remote(port) as other:
        with remote(port) as policy, pytest.raises(ServerLost):
            ask(policy, prompt="break")
        assert ask(other).shape == (CHUNK, 6)


def test_the_end_of_the_server_reaches_its_clients():
    with running_server() as port:
        policy = remote(port)
        ask(policy)
    with pytest.raises(ServerLost, match="the server is ending"):
        ask(policy)
    with pytest.raises(ServerLost, match="There is no policy server"):
        remote(port, connect_timeout=2)


def test_a_server_of_something_else_is_refused():
    with pytest.raises((ServerLost, ServerRefused)):
        RemotePolicy("http://127.0.0.1:1", connect_timeout=1)
    with server_that_says({"some": "policy"}) as port, pytest.raises(ContractError, match="has no contract"):
        remote(port)


def test_a_server_that_hangs_up_before_its_message_is_read(monkeypatch):
    def connect_and_wait(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.recv_events_thread.join(10)
        assert connection.socket.fileno() == -1
        return connection

    monkeypatch.setattr("vla.serving.client.connect", connect_and_wait)
    with server_that_says({"some": "policy"}) as port, pytest.raises(ContractError, match="has no contract"):
        remote(port)


def test_the_health_check_is_plain_http(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as reply:
        assert reply.status == 200 and reply.read() == b"OK\n"
