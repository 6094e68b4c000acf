"""One launch for a whole step: a CUDA graph over buffers of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before the capture, in which libraries choose algorithms and allocate workspaces."""


class CudaGraph:
    """`run` captured at the shapes of `inputs`. Raises what CUDA raises if `run` waits for the device.

    Inputs are copied into the graph's buffers, but for those that are the very tensors of the last call: what
    an instruction decides stays where it is until the instruction changes. A tensor that was handed in must
    therefore not be written to; observations come as new tensors.
    """

    def __init__(self, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self.run = run
        self._buffers = [tensor.clone() for tensor in inputs]
        self._held: list[Tensor | None] = [None] * len(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run(*self._buffers)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._output = run(*self._buffers)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return a copy of the output: the graph's own is overwritten by the next call."""
        for index, (buffer, tensor) in enumerate(zip(self._buffers, inputs, strict=True)):
            if self._held[index] is not tensor:
                buffer.copy_(tensor, non_blocking=True)
                self._held[index] = tensor
        self._graph.replay()
        return self._output.clone()
