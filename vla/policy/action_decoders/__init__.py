"""Action decoders, one file each, chosen by name in `CogMergeConfig.action_decoder`."""

from vla.policy.action_decoders.parallel_l1 import ParallelL1

ACTION_DECODERS = {"parallel_l1": ParallelL1}
