"""The wire format against openpi's own packer, and against messages made to do harm."""

import pickle

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from openpi_client import msgpack_numpy

from vla.serving.wire import WireError, decode, encode

ELEMENTS = ("?", "u1", "i2", ">i4", "<i8", "f2", "<f4", ">f8", "<U3", "S2")
array = st.sampled_from(ELEMENTS).flatmap(
    lambda name: arrays.arrays(np.dtype(name), arrays.array_shapes(min_dims=0, max_dims=3, min_side=0))
)


@settings(max_examples=60)
@given(array)
def test_arrays_travel_both_ways_between_openpi_and_us(value):
    message = {"observation/image": value, "list": [value, "x"], "n": 3}
    for there, back in ((encode, msgpack_numpy.unpackb), (msgpack_numpy.packb, decode)):
        got = back(there(message))
        assert got["n"] == 3 and got["list"][1] == "x"
        for copy in (got["observation/image"], got["list"][0]):
            assert copy.dtype == value.dtype and copy.shape == value.shape
            assert copy.tobytes() == value.tobytes()


@pytest.mark.parametrize(
    "value", [np.float32(0.1), np.int64(-3), np.bool_(True), np.uint8(255), np.str_("a")]
)
def test_scalars_travel_both_ways(value):
    assert decode(msgpack_numpy.packb(value)) == value == msgpack_numpy.unpackb(encode(value))
    assert isinstance(decode(encode(value)), type(value) if value.dtype.kind != "U" else str)


def test_what_is_decoded_can_be_written_to_and_is_in_the_senders_order():
    image = np.asfortranarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    got = decode(encode(image))
    assert np.array_equal(got, image) and got.flags.writeable


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.array([1j]), np.zeros(2, "i4,f4"), np.datetime64("2026-01-01"), {1, 2}]
)
def test_what_does_not_travel_is_refused_by_the_sender(value):
    with pytest.raises(WireError, match="not travel"):
        encode({"x": value})


class Trap:
    """Unpickling this runs code."""

    def __reduce__(self):
        return (pytest.fail, ("a message ran code",))


def marked(dtype, data, shape):
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (marked("|O", pickle.dumps(Trap()), [1]), "does not travel"),
        (marked("O", b"\0" * 8, [1]), "does not travel"),
        (marked("V8", b"\0" * 8, [1]), "does not travel"),
        (marked("i4,O", b"\0" * 12, [1]), "does not travel"),
        (marked("(2,2)f4", b"\0" * 16, [1]), "does not travel"),
        (marked(["f4"], b"\0" * 4, [1]), "does not travel"),
        (marked("no type", b"\0" * 4, [1]), "does not travel"),
        (marked("U900000000", b"", [0]), "does not travel"),
        (marked("f4", b"\0" * 4, [2]), r"takes 8 bytes, but 4 were sent"),
        (marked("f4", b"\0" * 8, [1]), r"takes 4 bytes, but 8 were sent"),
        (marked("f4", b"\0" * 4, [-1]), "cannot be"),
        (marked("f4", b"\0" * 4, [True]), "cannot be"),
        (marked("f4", b"\0" * 4, "1"), "cannot be"),
        (marked("f4", "text", [1]), "cannot be"),
        (marked("u1", b"", [2**62, 2**62, 0, 1]), None),
        (marked("u1", b"", [10**18]), "takes 1000000000000000000 bytes"),
        ({b"__ndarray__": True}, "does not travel"),
        ({b"__npgeneric__": True, b"data": "x", b"dtype": "f4"}, "was announced"),
        ({b"__npgeneric__": True, b"data": b"\0", b"dtype": "O"}, "does not travel"),
    ],
)
def test_messages_made_to_do_harm_are_refused(message, words):
    data = msgpack.packb({"observation/image": message})
    if words is None:  # an empty array of an absurd shape: numpy itself refuses it
        words = "not msgpack"
    with pytest.raises(WireError, match=words):
        decode(data)


@pytest.mark.parametrize("data", [b"", b"\xc1", pickle.dumps([1]), b"\x91" * 5000, encode([1]) + b"\0"])
def test_what_is_not_msgpack_is_one_sentence(data):
    with pytest.raises(WireError, match="not msgpack"):
        decode(data)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_noise_raises_nothing_else(data):
    try:
        decode(data)
    except WireError as error:
        assert "\n" not in str(error)


@settings(max_examples=200)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            b"__ndarray__": st.just(True),
            b"__npgeneric__": st.just(True),
            b"data": st.one_of(st.binary(max_size=16), st.integers(-9, 9), st.text(max_size=4), st.none()),
            b"dtype": st.one_of(st.text(max_size=4), st.sampled_from((*ELEMENTS, "O", "V4", "M8[s]", "c16"))),
            b"shape": st.one_of(st.lists(st.integers(-3, 5), max_size=9), st.none(), st.text(max_size=2)),
        },
    )
)
def test_any_marked_map_decodes_to_plain_data_or_is_refused(message):
    try:
        value = decode(msgpack.packb(message))
    except WireError:
        return
    assert not isinstance(value, np.ndarray) or value.dtype.kind in "biufSU"
