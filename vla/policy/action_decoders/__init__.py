"""Action decoders, one file each, chosen by name in `CogMergeConfig.action_decoder`."""

from vla.errors import UserError, nearest
from vla.policy.action_decoders.parallel_l1 import ParallelL1

ACTION_DECODERS = {"parallel_l1": ParallelL1}


def action_decoder(name: str) -> type:
    """Return the decoder class called `name`; raise `UserError` with the nearest match if unknown."""
    if name not in ACTION_DECODERS:
        raise UserError(
            f"Unknown policy.action_decoder '{name}'.{nearest(name, ACTION_DECODERS)}"
            f" Known: {', '.join(ACTION_DECODERS)}."
        )
    return ACTION_DECODERS[name]
