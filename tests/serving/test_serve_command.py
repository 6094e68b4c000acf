"""`vla serve` from outside: its process, a real checkpoint, openpi's client, and SIGTERM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from vla import cli
from vla.evaluation.policy_source import SHIPPED_CHECKPOINT
from vla.serving.client import RemotePolicy, ServerLost

VLA = Path(sys.executable).with_name("vla")


def start(*arguments, **environment):
    """Start `vla serve`; return the process and its port."""
    process = subprocess.Popen(
        [VLA, "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    for line in process.stderr:
        if "Serving" in line:
            return process, int(line.split("ws://127.0.0.1:")[1].split(".")[0])
    raise AssertionError("vla serve ended without serving")


@pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")
def test_openpis_client_gets_the_checkpoints_own_actions_and_sigterm_ends_it_cleanly():
    from vla.policy.checkpoint import load_checkpoint

    process, port = start("--checkpoint", SHIPPED_CHECKPOINT, "--device", "cpu", VLA_TOKEN="sesame")
    try:
        loaded = load_checkpoint(SHIPPED_CHECKPOINT)
        rng = np.random.default_rng(0)
        images = {
            camera.key: rng.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
            for camera in loaded.contract.interface.cameras
        }
        state = rng.normal(size=8).astype(np.float32)
        expected = loaded.act(images, state, "open the drawer")
        client = WebsocketClientPolicy("127.0.0.1", port, api_key="sesame")
        message = {key.replace(".", "/"): image for key, image in images.items()}
        actions = client.infer(message | {"observation/state": state, "prompt": "open the drawer"})["actions"]
        np.testing.assert_allclose(actions, expected, atol=1e-5)
        client._ws.close()
        with RemotePolicy(f"127.0.0.1:{port}", token="sesame") as policy:
            assert policy.contract == loaded.contract and policy.metadata["checkpoint"]["sha256"]
            policy.reset(3)
            np.testing.assert_allclose(policy.act(images, state, "open the drawer"), expected, atol=1e-5)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            with pytest.raises(ServerLost, match="the server is ending"):
                policy.act(images, state, "open the drawer")
        said = process.stderr.read()
        assert "Traceback" not in said and said.endswith("The policy server has ended.\n")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
        (["--rename", "a:b"], "is not CLIENT=OURS"),
        (["--max-clients", "0"], "every limit must be positive"),
        (["--host", "192.0.2.1"], "Port 8000 on 192.0.2.1 cannot be served on"),
        (["--token", "two words"], "without spaces"),
        (["--device", "cuda"], "sees no CUDA device"),
        (["--device", "cpu", "--engine", "int4"], "has no mode 'int4' on cpu"),
    ],
)
def test_what_cannot_be_served_is_one_sentence_and_code_2(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.run(["serve", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said and "Traceback" not in said


def test_the_engine_answers_as_the_checkpoint_does():
    from vla.evaluation.policy_source import CheckpointSource
    from vla.policy.checkpoint import load_checkpoint
    from vla.serving.serve import ServeConfig, serve_source

    said = []
    config = ServeConfig(device="cpu", engine="fp32")
    served = serve_source(CheckpointSource.open(SHIPPED_CHECKPOINT), config, said.append)
    loaded = load_checkpoint(SHIPPED_CHECKPOINT)
    assert served.contract == loaded.contract and served.identity["engine"] == "fp32"
    assert len(said) == 2 and said[1].startswith("The engine answers in mode fp32, in ")
    assert served.make_policy()._loaded._programs  # built before the first client asks
    rng = np.random.default_rng(1)
    images = {
        camera.key: rng.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
        for camera in loaded.contract.interface.cameras
    }
    state = rng.normal(size=8).astype(np.float32)
    policy = served.make_policy()
    policy.reset(0)
    for task in ("open the drawer", "put the bowl on the plate"):
        np.testing.assert_allclose(
            policy.act(images, state, task), loaded.act(images, state, task), atol=2e-3
        )


def test_the_client_needs_no_torch():
    program = (
        "import sys, vla.serving.client;"
        "print(sorted({'torch', 'lerobot', 'transformers', 'tyro', 'pickle5'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_client_that_samples_is_not_disturbed_by_others():
    import torch

    from vla.serving.serve import ClientPolicy

    class Sampler:
        def act(self, images, state, instruction):
            return torch.randn(2, 3).numpy()

    def draws(client, count):
        return [client.act({}, np.zeros(0), "") for _ in range(count)]

    alone, one, two = (ClientPolicy(Sampler()) for _ in range(3))
    for client, seed in ((alone, 4), (one, 4), (two, 9)):
        client.reset(seed)
    before = torch.get_rng_state()
    expected = draws(alone, 2)
    first = draws(one, 1)
    draws(two, 3)
    assert np.array_equal([*first, *draws(one, 1)], expected)
    assert not np.array_equal(expected[0], expected[1])
    assert torch.equal(torch.get_rng_state(), before)
