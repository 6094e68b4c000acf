"""Small policies on the path that ``COGMERGE_KERNELS`` forces: ``policy_on_kernels_worker.py OUT.json``.

Writes what every case computed and which custom operations of ours it called. A script, because the path and
Triton's interpreter are chosen for a whole process.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from small_checkpoint import requests, shrunk, small_checkpoint

from vla.runtime.engine import PolicyEngine


class Calls(TorchDispatchMode):
    """Counts calls of our custom operations, in the forward and the backward pass."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "cogmerge":
            self.counts[function.name().split("::")[1]] += 1
        return function(*args, **kwargs or {})


def routed():
    """One step of the policy as it is evaluated: ``[text | vision | state | slots]``."""
    loaded = small_checkpoint()
    return lambda: loaded.act(*requests(2)[1])


def engine():
    """The traced step of the runtime, text and observation as two streams."""
    runtime = PolicyEngine(small_checkpoint(decoder="qwen3", decoder_kv_heads=1, stem_strides=[16]), "fp32")
    request = requests(1)[0]
    runtime.act(*request)
    return lambda: runtime.act(*request)


def pretrained():
    """SigLIP, DINOv2 and Qwen2 blocks, grouped heads, an action expert that reads every layer."""
    loaded = small_checkpoint(**shrunk("mergevla-0.5b"))
    return lambda: loaded.act(*requests(1)[0])


def narrow():
    """The traced step in bf16, as on a GPU, with an action expert: rows and weights come in two dtypes."""
    runtime = PolicyEngine(small_checkpoint(**shrunk("mergevla-0.5b")), "bf16")
    request = requests(1)[0]
    runtime.act(*request)
    return lambda: runtime.act(*request)


def learning():
    """A loss and the sizes of all gradients."""
    loaded = small_checkpoint(decoder_layers=2)
    policy, request = loaded.policy, requests(1)[0]
    batch = loaded.preprocessor(loaded.batch(*request))
    batch["action"] = torch.linspace(-1, 1, 28).reshape(1, 4, 7)

    def step():
        loss = policy(batch)[0]
        loss.backward()
        sizes = [p.grad.norm() for p in policy.parameters() if p.grad is not None]
        return torch.stack([loss.detach(), *sizes])

    return step


def main(out: Path) -> None:
    """Run every case and write ``{case: {"values": ..., "ops": {name: calls}}}``."""
    torch.set_num_threads(1)
    found = {}
    for case in (routed, engine, pretrained, narrow, learning):
        run = case()
        with Calls() as calls:
            values = run()
        found[case.__name__] = {"values": values.tolist(), "ops": calls.counts}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
