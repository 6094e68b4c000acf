"""Feetech packets, byte for byte against packets worked by hand, and a reader that survives noise."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.robot_drivers.so101 import codec, registers
from vla.robot_drivers.so101.codec import Packet, PacketReader


def h(text: str) -> bytes:
    return bytes.fromhex(text)


# The sums are written out: checksum = 255 - (sum mod 256).
@pytest.mark.parametrize(
    ("packet", "wire"),
    [
        (codec.ping(1), "FF FF 01 02 01 FB"),  # 1+2+1 = 4
        (codec.read(1, 56, 2), "FF FF 01 04 02 38 02 BE"),  # 1+4+2+56+2 = 65
        (codec.write(3, 40, b"\x00"), "FF FF 03 04 03 28 00 CD"),  # 3+4+3+40 = 50
        (codec.write(254, 5, b"\x01"), "FF FF FE 04 03 05 01 F4"),  # 254+4+3+5+1 = 267 = 11
        # 254+8+130+56+15+1+2+3+4 = 473 = 217
        (codec.sync_read([1, 2, 3, 4], 56, 15), "FF FF FE 08 82 38 0F 01 02 03 04 26"),
        # position 2048 and 1000 for servos 1 and 2: 254+10+131+42+2 + 1+0+8 + 2+232+3 = 685 = 173
        (codec.sync_write(42, {1: h("0008"), 2: h("E803")}), "FF FF FE 0A 83 2A 02 01 00 08 02 E8 03 52"),
        (Packet(1, 0), "FF FF 01 02 00 FC"),  # a plain acknowledgement
        (Packet(2, 0x20, b"\x18\x05"), "FF FF 02 04 20 18 05 BC"),  # 2+4+32+24+5 = 67, overload
    ],
)
def test_packets_byte_for_byte(packet, wire):
    assert packet.encode() == h(wire)
    assert PacketReader().feed(h(wire)) == [packet]


@pytest.mark.parametrize("packet", [Packet(255, 1), Packet(-1, 1), Packet(1, 1, bytes(251))])
def test_impossible_packets_are_refused(packet):
    with pytest.raises(ValueError):
        packet.encode()


def test_sync_write_needs_parts_of_one_length():
    with pytest.raises(ValueError):
        codec.sync_write(42, {1: b"\0", 2: b"\0\0"})


quick = settings(max_examples=60)
PACKETS = st.builds(Packet, st.integers(0, 254), st.integers(0, 255), st.binary(max_size=20))


@quick
@given(st.lists(PACKETS, max_size=6), st.lists(st.integers(1, 9), min_size=1))
def test_any_packets_cut_anywhere_come_back(packets, cuts):
    stream, reader, found = b"".join(p.encode() for p in packets), PacketReader(), []
    while stream:
        for cut in cuts:
            found += reader.feed(stream[:cut])
            stream = stream[cut:]
    assert found == packets and reader.skipped == 0 and reader.pending == 0


@quick
@given(st.binary(max_size=30).filter(lambda noise: b"\xff" not in noise), PACKETS)
def test_noise_before_a_packet_is_skipped(noise, packet):
    reader = PacketReader()
    assert reader.feed(noise + packet.encode()) == [packet]
    assert reader.skipped == len(noise)


@pytest.mark.parametrize(
    ("noise", "skipped"),
    [
        ("FF", 1),  # a third FF in a row
        ("FF FF FF", 3),
        ("FF FF 01 01", 4),  # a length that no packet has
        ("FF FF 01 02 00 00", 6),  # a bad checksum
        ("FF FF 01 04 00 38 02", 7),  # a packet that lost its checksum: the next one is inside its claim
    ],
)
def test_the_reader_finds_the_packet_behind_a_damaged_one(noise, skipped):
    packet = Packet(1, 0, h("12 34 56 78"))
    reader = PacketReader()
    assert reader.feed(h(noise) + packet.encode()) == [packet]
    assert reader.skipped == skipped


@quick
@given(PACKETS, st.integers(0, 199), st.integers(1, 255))
def test_no_single_damaged_byte_goes_unnoticed(packet, where, flip):
    wire = bytearray(packet.encode())
    wire[where % len(wire)] ^= flip
    assert packet not in PacketReader().feed(bytes(wire))


def test_a_length_beyond_what_is_expected_does_not_make_the_reader_wait():
    reader = PacketReader(longest=15)
    packet = Packet(1, 0, b"\x01")
    assert reader.feed(h("FF FF 01 40 00") + packet.encode()) == [packet]


@pytest.mark.parametrize(
    ("register", "value", "wire"),
    [
        (registers.PRESENT_POSITION, 2048, "00 08"),
        (registers.PRESENT_POSITION, -5, "05 80"),  # bit 15 says negative
        (registers.PRESENT_LOAD, -300, "2C 05"),  # bit 10: 300 = 0x12C, plus 0x400
        (registers.HOMING_OFFSET, -512, "00 0A"),  # bit 11: 512 = 0x200, plus 0x800
        (registers.HOMING_OFFSET, 2047, "FF 07"),
        (registers.MODEL_NUMBER, 777, "09 03"),
        (registers.TORQUE_ENABLE, 1, "01"),
    ],
)
def test_register_encodings_byte_for_byte(register, value, wire):
    assert register.pack(value) == h(wire)
    assert register.unpack(h(wire)) == value


def test_minus_zero_reads_as_zero():
    assert registers.PRESENT_VELOCITY.unpack(h("00 80")) == 0


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (registers.HOMING_OFFSET, 2048),
        (registers.HOMING_OFFSET, -2048),
        (registers.PRESENT_POSITION, 32768),
        (registers.TORQUE_ENABLE, 256),
        (registers.TORQUE_ENABLE, -1),
    ],
)
def test_values_that_do_not_fit_are_refused(register, value):
    with pytest.raises(ValueError, match=f"does not fit the register at address {register.address}"):
        register.pack(value)
    with pytest.raises(ValueError, match="bytes, got"):
        register.unpack(bytes(register.size + 1))


def test_status_bits_have_words():
    assert registers.Condition.words(0x25) == ("voltage", "overheating", "overload")
    assert registers.Condition.words(0x41) == ("voltage", "unknown status bits 0x40")
    assert registers.Condition.words(0) == ()
