"""Partial evaluation of a traced function: what depends on its early inputs alone is computed early.

A policy step reads an instruction, which stays for an episode, and an observation, which is new every time.
Its graph is cut by data flow: nodes that depend on no input are computed once; nodes that depend on the
instruction alone (text embeddings, keys and values, every FiLM scale and shift, the gates that mix encoders,
masks, position tables) become the *early* graph, the rest the *late* graph. Nothing is named by hand, so that
no model can forget to declare a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

CONSTANT, EARLY, LATE = 0, 1, 2


@dataclass(frozen=True)
class Specialised:
    """``run(*early, *late) == late_graph(*late, *early_graph(*early))``."""

    early: fx.GraphModule
    late: fx.GraphModule


def trace(run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Trace `run` at the shapes of `inputs` into one graph of ATen operations, without gradients.

    Tensors that `run` closes over become attributes of the graph. Raises what torch raises if `run` looks
    at a tensor's values: such a step would wait for the device.
    """
    with torch.no_grad():
        graph = make_fx(torch.func.functionalize(run), tracing_mode="fake", _allow_non_fake_inputs=True)(
            *inputs
        )
    graph.graph.eliminate_dead_code()
    return graph


def specialise(graph: fx.GraphModule, early_inputs: int) -> Specialised:
    """Cut `graph`, whose first `early_inputs` inputs are early and whose further ones are late."""
    stages = _stages(graph.graph, early_inputs)
    crossing = [
        node
        for node in graph.graph.nodes
        if stages[node] != LATE and node.op != "get_attr" and any(stages[user] == LATE for user in node.users)
    ]
    folded = [node for node in crossing if stages[node] == CONSTANT]
    handed = [node for node in crossing if stages[node] == EARLY]
    constants = dict(zip(folded, _run_constants(graph, folded), strict=True))
    return Specialised(_early_graph(graph, stages, handed), _late_graph(graph, stages, constants, handed))


def _stages(graph: fx.Graph, early_inputs: int) -> dict[fx.Node, int]:
    """Say for every node when it can be computed."""
    stages: dict[fx.Node, int] = {}
    placeholders = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            stages[node] = EARLY if placeholders < early_inputs else LATE
            placeholders += 1
        elif node.op == "output":
            stages[node] = LATE
        else:
            stages[node] = max((stages[source] for source in node.all_input_nodes), default=CONSTANT)
    return stages


def _run_constants(graph: fx.GraphModule, nodes: list[fx.Node]) -> tuple[Tensor, ...]:
    needed, copies = fx.Graph(), {}
    for node in graph.graph.nodes:
        if node.op not in ("placeholder", "output") and all(s in copies for s in node.all_input_nodes):
            copies[node] = needed.node_copy(node, copies.__getitem__)
    needed.output(tuple(copies[node] for node in nodes))
    needed.eliminate_dead_code()
    with torch.no_grad():
        return fx.GraphModule(graph, needed)()


def _early_graph(graph: fx.GraphModule, stages: dict[fx.Node, int], results: list[fx.Node]) -> fx.GraphModule:
    early, copies = fx.Graph(), {}
    for node in graph.graph.nodes:
        if stages[node] != LATE:
            copies[node] = early.node_copy(node, copies.__getitem__)
    early.output(tuple(copies[node] for node in results))
    early.eliminate_dead_code()
    return fx.GraphModule(graph, early)


def _late_graph(
    graph: fx.GraphModule,
    stages: dict[fx.Node, int],
    constants: dict[fx.Node, Tensor],
    handed: list[fx.Node],
) -> fx.GraphModule:
    late, copies = fx.Graph(), {}
    for node in graph.graph.nodes:  # the late inputs come first
        if node.op == "placeholder" and stages[node] == LATE:
            copies[node] = late.node_copy(node)
    for index, node in enumerate(handed):
        copies[node] = late.placeholder(f"early_{index}")
    attributes: dict[str, Tensor] = {}
    for index, (node, value) in enumerate(constants.items()):
        attributes[f"constant_{index}"] = value
        copies[node] = late.get_attr(f"constant_{index}")
    for node in graph.graph.nodes:
        if node not in copies and (stages[node] == LATE or node.op == "get_attr"):
            copies[node] = late.node_copy(node, copies.__getitem__)
    late.eliminate_dead_code()
    used = {node.target for node in late.nodes if node.op == "get_attr"}
    attributes |= {name: getattr(graph, name) for name in used - attributes.keys()}
    return fx.GraphModule({name: attributes[name] for name in used}, late)
