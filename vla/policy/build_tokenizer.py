"""Build the shipped word tokenizer: ``python -m vla.policy.build_tokenizer``.

The vocabulary is every word of all LIBERO and LIBERO-PRO instructions plus words that are common in
manipulation. Needs the `sim` extra, for the task files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

PAD, UNKNOWN, BEGIN = "[PAD]", "[UNK]", "[BOS]"

MANIPULATION_WORDS = """
    a about above across after again against align all along an and any apple arm around arrange as
    ascend at away back bag ball banana base basin basket be before behind below bend beside between
    big bin black block blue board book both bottle bottom bowl box bread brown brush bucket bulb
    burner button by cabinet can cap card carrot carry catch center centre chair charger cheese chip
    chocolate circle clean clear clip clockwise close closed closer cloth coffee cold collect color
    colour compartment container cook corner counter cover cream cube cup cupboard cut cutter
    cylinder dark desk dish disk do door down drag drawer drop dry each edge egg eight eject empty
    end every eye face far fasten fetch fill finish first five flat flip floor fold food for fork
    forward four fourth fridge from front full fully gather gear gently get give glass go grab grape
    grasp gray green grey grip ground hammer hand handle hang he heat hinge hit hold hole home hook
    hot in insert inside into it item jar join key knife knob lamp large larger last leave left
    leftmost lemon lever lid lift light lock long low lower machine magnet marker mat me meat metal
    microwave middle milk mix move mug my nail napkin near next nine no not nut object of off on one
    onion open opposite or orange other oven over package pad pan paper part peg pen pencil pepper
    pick pie piece pin pink place plant plastic plate play plug point position pot potato pour press
    pudding pull purple push put rack ramekin raise reach rear red remove repeat replace rest return
    right rightmost ring robot roll rope rotate round rubber salad salt same sauce screw screwdriver
    second separate set seven shape shelf shoe short shut side sink sit six slide slider slot slow
    small smaller so soap socket soft some sort soup spatula sponge spoon square stack stand start
    stay steak stick stop stove straight string sugar surface sweep swipe switch table take tall
    tape target tea ten than that the their them then there these they thing third this those three
    through tie tilt to toaster together tomato tool top touch toward towards towel tower toy
    transfer trash tray triangle turn turned twist two under unfold unlock unplug unscrew until up
    upper upright upside use utensil vegetable vertical wait wall wash water well which while white
    wide window wine wipe wire with wood wooden wrap wrench yellow yes you your zero
"""


def instruction_words(bddl_root: Path) -> set[str]:
    """Words of the ``(:language ...)`` line of every task file below `bddl_root`, lower case."""
    words: set[str] = set()
    for path in bddl_root.rglob("*.bddl"):
        match = re.search(r"\(:language\s+([^)]*)\)", path.read_text(errors="replace"))
        if match:
            words.update(re.findall(r"[a-z]+|[0-9]", match.group(1).lower()))
    return words


def build(words: set[str]) -> Tokenizer:
    """Build the tokenizer over `words`; ids are the sorted order, so equal words give an equal file."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = ["##s", "##es", "##ed", "##ing", "##er", "##ly"]
    known = set(letters) | {"##" + letter for letter in letters} | set(endings)
    entries = [PAD, UNKNOWN, BEGIN, *sorted(known), *sorted(words - known)]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=1000))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[_\\-]"), " "),
        ]
    )
    # ByteLevel writes every byte as a printable character of its alphabet, all of which are known.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.BertPreTokenizer(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return tokenizer


def main() -> None:
    """Write ``tokenizer/nano.json`` beside this file."""
    import libero.libero

    root = Path(libero.libero.__file__).parent / "bddl_files"
    tokenizer = build(instruction_words(root) | set(MANIPULATION_WORDS.split()))
    path = Path(__file__).parent / "tokenizer" / "nano.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    tokenizer.save(str(temporary))
    os.replace(temporary, path)
    print(f"{path}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
