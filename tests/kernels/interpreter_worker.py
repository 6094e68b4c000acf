"""Runs kernels in Triton's interpreter, for the fixture `interpreter`; started as a script.

The interpreter is chosen when Triton is imported, for the whole process, and the tests' own process must
stay free to compile for a GPU. New memory is filled with NaN, so that an element that a kernel fails to write
shows. Messages are pickled by value: tensors in shared memory would outlive their sender.
"""

import os
import pickle
import sys
import traceback
from importlib import import_module
from multiprocessing.connection import Client

os.environ["TRITON_INTERPRET"] = "1"

import torch


def answer(op, arguments, options, upstream):
    """Outputs of the op's Triton path and, given `upstream` gradients, those of its floating arguments."""
    function = getattr(import_module(f"vla.kernels.{op.rstrip('_')}"), op)
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for x in inputs if upstream else ():
        x.requires_grad_()
    outputs = function(*arguments, **options, path="triton")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = ()
    if upstream:
        followed = [i for i, gradient in enumerate(upstream) if gradient is not None]
        gradients = torch.autograd.grad(
            [outputs[i] for i in followed], inputs, [upstream[i] for i in followed], allow_unused=True
        )
    return tuple(y.detach() for y in outputs), gradients


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with Client(sys.argv[1]) as connection:
        while (request := pickle.loads(connection.recv_bytes())) is not None:
            try:
                reply = answer(*request)
            except Exception:  # told to the test that asked
                reply = traceback.format_exc()
            connection.send_bytes(pickle.dumps(reply))


if __name__ == "__main__":
    main()
