"""Instructions as token ids: the small word tokenizer that ships with the package, or a backbone's own.

In the shipped one, whole words of the vocabulary are one token. Any other word is spelled: its longest known
beginning, then longest known pieces, down to single bytes, so that no word crashes and different unknown
words differ ("plates" is "plate" + "s"). The file is a standard `tokenizers` JSON built by
`vla.policy.build_tokenizer`; a pretrained decoder brings the ``tokenizer.json`` of its own folder.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers.utils import cached_file

from vla.errors import UserError, nearest

TOKENIZERS = ("nano",)
TOKENIZER_FILE = "tokenizer.json"
#: Text is padded to a multiple of this, so that few distinct shapes occur.
BUCKET = 8
MAX_TOKENS = 128


@cache
def load_tokenizer(name: str) -> Tokenizer:
    """Load the shipped tokenizer `name`, or the one of a decoder in a local folder or on the hub.

    Raises `UserError` if there is none. A model without ``tokenizer.json`` has no tokenizer that could be
    stored in a checkpoint and used without its code.
    """
    if name in TOKENIZERS:
        return Tokenizer.from_str((files("vla.policy") / "tokenizer" / f"{name}.json").read_text())
    if "/" not in name and not Path(name).is_dir():
        raise UserError(
            f"Unknown tokenizer '{name}'.{nearest(name, TOKENIZERS)} Known: {', '.join(TOKENIZERS)},"
            " or the folder or hub name of a decoder."
        )
    try:
        return Tokenizer.from_file(cached_file(name, TOKENIZER_FILE))
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{name}' has no readable {TOKENIZER_FILE} ({reason}).") from None


def vocabulary_size(name: str) -> int:
    """Number of token ids of tokenizer `name`."""
    return load_tokenizer(name).get_vocab_size()


def encode(texts: list[str], tokenizer: str | Tokenizer = "nano") -> tuple[Tensor, Tensor]:
    """Token ids (B, T) int64 and their validity (B, T) bool; T is the longest text, rounded up to `BUCKET`.

    Every text starts with whatever its tokenizer starts texts with (``[BOS]``; Qwen's have none). Raises
    `UserError` for a text of no token or of more than `MAX_TOKENS`.
    """
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    encodings = tokenizer.encode_batch(texts)
    if not all(encoding.ids for encoding in encodings):
        raise UserError("An instruction is empty and its tokenizer adds no token of its own; write one word.")
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
