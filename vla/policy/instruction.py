"""Instructions as token ids: the small word tokenizer that ships with the package.

Whole words of the vocabulary are one token. Any other word is spelled: its longest known beginning, then
longest known pieces, down to single bytes, so that no word crashes and different unknown words differ
("plates" is "plate" + "s"). The file is a standard `tokenizers` JSON built by `vla.policy.build_tokenizer`.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vla.errors import UserError, nearest

TOKENIZERS = ("nano",)
#: Text is padded to a multiple of this, so that few distinct shapes occur.
BUCKET = 8
MAX_TOKENS = 128


@cache
def load_tokenizer(name: str) -> Tokenizer:
    """Load the shipped tokenizer `name`; raise `UserError` if there is none of that name."""
    if name not in TOKENIZERS:
        raise UserError(
            f"Unknown tokenizer '{name}'.{nearest(name, TOKENIZERS)} Known: {', '.join(TOKENIZERS)}."
        )
    return Tokenizer.from_str((files("vla.policy") / "tokenizer" / f"{name}.json").read_text())


def vocabulary_size(name: str) -> int:
    """Number of token ids of tokenizer `name`."""
    return load_tokenizer(name).get_vocab_size()


def encode(texts: list[str], name: str = "nano") -> tuple[Tensor, Tensor]:
    """Token ids (B, T) int64 and their validity (B, T) bool; T is the longest text, rounded up to `BUCKET`.

    Every text starts with ``[BOS]``. Raises `UserError` for a text of more than `MAX_TOKENS` tokens.
    """
    encodings = load_tokenizer(name).encode_batch(texts)
    longest = max(len(encoding.ids) for encoding in encodings)
    if longest > MAX_TOKENS:
        raise UserError(
            f"An instruction has {longest} tokens but the policy reads at most {MAX_TOKENS}; shorten it:"
            f" '{max(texts, key=len)[:60]}...'."
        )
    width = -(-longest // BUCKET) * BUCKET
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    valid = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
        valid[row, : len(encoding.ids)] = True
    return ids, valid
