"""Action decoders, one file each, chosen by name in `CogMergeConfig.action_decoder`."""

from vla.policy.action_decoders.action_decoder import ActionDecoder
from vla.policy.action_decoders.coordinate_l1 import CoordinateL1
from vla.policy.action_decoders.cross_attention import CrossAttention
from vla.policy.action_decoders.parallel_l1 import ParallelL1
from vla.policy.action_decoders.self_attention import SelfAttention

ACTION_DECODERS: dict[str, type[ActionDecoder]] = {
    "parallel_l1": ParallelL1,
    "coordinate_l1": CoordinateL1,
    "cross_attention": CrossAttention,
    "self_attention": SelfAttention,
}
