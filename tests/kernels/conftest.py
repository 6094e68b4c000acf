"""How the tests of this room run a Triton kernel: interpreted, compiled for an absent GPU, or on one."""

import os
import pickle
import subprocess
import sys
from multiprocessing.connection import Listener
from pathlib import Path

import pytest
import torch

from vla.kernels.launch import TRITON_INSTALLED

#: Largest relative error, in the Frobenius norm, against the fp64 reference.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_close_to_reference(got, want, dtype, factor=1.0):
    """Every tensor of `got` within `dtype`'s relative error of `want`; NaN fails."""
    assert len(got) == len(want)
    for index, (x, y) in enumerate(zip(got, want, strict=True)):
        assert (x is None) == (y is None), index
        if x is not None and y.numel():
            assert x.shape == y.shape, index
            error = (x.double().cpu() - y.double().cpu()).norm() / y.double().cpu().norm().clamp(min=1e-9)
            assert error <= factor * TOLERANCE[dtype], f"tensor {index}: relative error {error:.2e}"


@pytest.fixture(scope="session")
def close_to_reference():
    return assert_close_to_reference


class Interpreter:
    """A process that answers calls of ``vla.kernels`` with Triton's interpreter."""

    def __init__(self, address: Path):
        listener = Listener(str(address))
        script = Path(__file__).with_name("interpreter_worker.py")
        # The kernels' own switch would turn the worker's forced path into an error; ours is explicit.
        environment = {k: v for k, v in os.environ.items() if k != "COGMERGE_KERNELS"}
        self._process = subprocess.Popen([sys.executable, "-P", script, address], env=environment)
        self._connection = listener.accept()
        listener.close()

    def __call__(self, op, *arguments, upstream=None, **options):
        self._connection.send_bytes(pickle.dumps((op, arguments, options, upstream)))
        reply = pickle.loads(self._connection.recv_bytes())
        assert not isinstance(reply, str), f"in the interpreter's process:\n{reply}"
        return reply

    def close(self):
        self._connection.send_bytes(pickle.dumps(None))
        assert self._process.wait(timeout=300) == 0


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory):
    if not TRITON_INSTALLED:
        pytest.skip("Triton is not installed")
    process = Interpreter(tmp_path_factory.mktemp("interpreter") / "socket")
    yield process
    process.close()


def on_cuda(op, *arguments, upstream=None, **options):
    """The same call as `Interpreter.__call__`, in this process on the GPU."""
    from importlib import import_module

    def move(x):
        return x.cuda() if isinstance(x, torch.Tensor) else x

    arguments = [move(x) for x in arguments]
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for x in inputs if upstream else ():
        x.requires_grad_()
    function = getattr(import_module(f"vla.kernels.{op.rstrip('_')}"), op)
    outputs = function(*arguments, **options, path="triton")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = ()
    if upstream:
        pairs = [(y, move(g)) for y, g in zip(outputs, upstream, strict=True) if g is not None]
        gradients = torch.autograd.grad(
            [y for y, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True
        )
    return tuple(y.detach() for y in outputs), gradients


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_path(request):
    """``triton_path(op, *arguments, upstream=..., **options)`` to (outputs, gradients of float arguments)."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return on_cuda


@pytest.fixture(scope="session")
def compile_for_h200():
    """``compile_for_h200(kernel, {argument: type}, constants)`` compiles to sm_90 machine code, with no GPU.

    The interpreter takes programs that the compiler refuses; this closes the gap as far as it closes here.
    """

    triton = pytest.importorskip("triton")

    def compile_kernel(kernel, types, constants):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        function = kernel.jit()
        signature = {name: types.get(name, "constexpr") for name in function.arg_names}
        missing = [n for n, kind in signature.items() if kind == "constexpr" and n not in constants]
        source = ASTSource(function, signature, constants | dict.fromkeys(missing))
        return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

    return compile_kernel
