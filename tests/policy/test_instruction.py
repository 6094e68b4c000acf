import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.errors import UserError
from vla.policy.build_tokenizer import MANIPULATION_WORDS, build
from vla.policy.instruction import MAX_TOKENS, encode, load_tokenizer

SENTENCES = [
    "pick up the alphabet soup and place it in the basket",
    "turn on the stove and put the moka pot on it",
    "put the white mug on the left plate and put the yellow and white mug on the right plate",
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
]


def ids(text: str) -> list[int]:
    tokens, valid = encode([text])
    return tokens[0][valid[0]].tolist()


@pytest.mark.parametrize("sentence", SENTENCES)
def test_benchmark_words_are_single_tokens(sentence):
    assert len(ids(sentence)) == 1 + len(sentence.split())


@given(st.text(max_size=60))
def test_nothing_crashes_and_nothing_is_unknown(text):
    unknown = load_tokenizer("nano").token_to_id("[UNK]")
    assert unknown not in ids(text)


@given(*[st.text("abcdefghijklmnopqrstuvwxyzéß把", min_size=1, max_size=12)] * 2)
def test_unknown_words_that_differ_stay_different(a, b):
    normal = load_tokenizer("nano").normalizer.normalize_str
    assert (ids(a) == ids(b)) == (normal(a) == normal(b))


def test_known_word_with_an_ending_keeps_its_stem():
    assert load_tokenizer("nano").encode("plates").tokens == ["[BOS]", "plate", "##s"]


def test_case_underscores_and_accents_do_not_matter():
    assert ids("Pick_up the CAFÉ") == ids("pick up the cafe")


def test_padding_is_marked_and_bucketed():
    tokens, valid = encode(["open it", SENTENCES[2]])
    assert tokens.shape[1] % 8 == 0 and valid.sum(1).tolist() == [3, 20]


def test_overlong_instruction_is_refused():
    with pytest.raises(UserError, match=f"at most {MAX_TOKENS}; shorten it"):
        encode(["word " * 300])


def test_unknown_tokenizer_is_refused():
    with pytest.raises(UserError, match="Did you mean 'nano'"):
        load_tokenizer("nani")


def test_the_shipped_file_is_what_the_builder_builds():
    """Same vocabulary as words -> file; the benchmark's own words are read off the shipped vocabulary."""
    shipped = load_tokenizer("nano")
    words = {word for word in shipped.get_vocab() if word.isalpha() and word.isascii() and len(word) > 1}
    assert set(MANIPULATION_WORDS.split()) <= shipped.get_vocab().keys()
    assert build(words).get_vocab() == shipped.get_vocab()
