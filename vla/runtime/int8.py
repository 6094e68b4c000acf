"""Dynamic int8: the linear layers of a traced graph, with weights quantised once and activations per call."""

from __future__ import annotations

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten


def quantise_linears(graph: fx.GraphModule) -> int:
    """Replace each product of activations with a constant matrix in `graph`; return how many there were.

    Weights are symmetric int8 per output channel, activations int8 with one scale per call, sums int32, by
    torch's own kernels. CPU only.
    """
    replaced = 0
    for node in list(graph.graph.nodes):
        if node.target is _ATEN.addmm.default:
            bias, x, matrix = node.args
        elif node.target is _ATEN.mm.default:
            bias, (x, matrix) = None, node.args
        else:
            continue
        weight, offset = _constant(graph, matrix), _constant(graph, bias)
        if weight is None or (bias is not None and offset is None):
            continue
        name = f"int8_{replaced}"
        setattr(graph, name, _pack(weight, offset))
        with graph.graph.inserting_before(node):
            # Not `get_attr`: it warns of attributes that are neither tensor nor module.
            packed = graph.graph.create_node("get_attr", name)
            linear = graph.graph.call_function(torch.ops.quantized.linear_dynamic.default, (x, packed))
        node.replace_all_uses_with(linear)
        graph.graph.erase_node(node)
        replaced += 1
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return replaced


def _constant(graph: fx.GraphModule, node: fx.Node | None) -> Tensor | None:
    if node is None or node.op != "get_attr":
        return None
    return getattr(graph, node.target).detach()


def _pack(matrix: Tensor, bias: Tensor | None):
    """Quantise `matrix` (in, out) for torch's int8 kernels."""
    weight = matrix.float().t().contiguous()
    scales = weight.abs().amax(1).clamp(min=1e-8) / 127
    zeros = torch.zeros(len(scales), dtype=torch.long)
    quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(quantised, None if bias is None else bias.float())
