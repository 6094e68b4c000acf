"""The emulated bus without its process: protocol answers, memory, motion, faults on demand."""

from itertools import pairwise

import pytest

from vla.robot_drivers.emulation.line import EmulatedLine, Injection, is_goal
from vla.robot_drivers.emulation.servo import FREE_SPEED, EmulatedServo
from vla.robot_drivers.so101 import codec
from vla.robot_drivers.so101 import registers as r
from vla.robot_drivers.so101.codec import Packet, PacketReader

MEGABAUD = 1_000_000


def h(text: str) -> bytes:
    return bytes.fromhex(text)


def bus(count: int = 3) -> EmulatedLine:
    return EmulatedLine(EmulatedServo(id) for id in range(1, count + 1))


def ask(line: EmulatedLine, command: Packet, baudrate: int = MEGABAUD) -> list[Packet]:
    return PacketReader().feed(b"".join(reply.wire for reply in line.answer(command, baudrate)))


def put(line: EmulatedLine, id: int, register: r.Register, value: int) -> list[Packet]:
    return ask(line, codec.write(id, register.address, register.pack(value)))


def get(line: EmulatedLine, id: int, register: r.Register) -> int:
    (reply,) = ask(line, codec.read(id, register.address, register.size))
    assert (reply.id, reply.code) == (id, 0)
    return register.unpack(reply.parameters)


def test_a_read_byte_for_byte():
    """FF FF 01 04 02 38 02 BE asks for the position; 2048 = 0x0800, 255 - (1+4+0+0+8) = 0xF2."""
    (command,) = PacketReader().feed(h("FF FF 01 04 02 38 02 BE"))
    (reply,) = bus().answer(command, MEGABAUD)
    assert reply.wire == h("FF FF 01 04 00 00 08 F2")


def test_who_answers_what():
    line = bus()
    assert ask(line, codec.ping(2)) == [Packet(2, 0)]
    assert ask(line, codec.ping(9)) == []
    assert [reply.id for reply in ask(line, codec.ping(codec.BROADCAST))] == [1, 2, 3]
    assert [reply.id for reply in ask(line, codec.sync_read([3, 1, 7], 56, 2))] == [3, 1]
    assert ask(line, codec.sync_write(42, {1: h("0004"), 2: h("0005")})) == []
    assert get(line, 1, r.GOAL_POSITION) == 1024 and get(line, 2, r.GOAL_POSITION) == 1280
    assert ask(line, codec.write(codec.BROADCAST, r.ACCELERATION.address, b"\x14")) == []
    assert [get(line, id, r.ACCELERATION) for id in (1, 2, 3)] == [20, 20, 20]
    assert ask(line, codec.ping(1), baudrate=115_200) == []


def test_a_registered_write_waits_for_action():
    line = bus()
    assert ask(line, Packet(1, codec.Instruction.REG_WRITE, h("2A 00 04"))) == [Packet(1, 0)]
    assert get(line, 1, r.GOAL_POSITION) == 2048
    ask(line, Packet(codec.BROADCAST, codec.Instruction.ACTION))
    assert get(line, 1, r.GOAL_POSITION) == 1024


def test_only_unlocked_eeprom_outlives_the_supply():
    line = bus()
    put(line, 1, r.MAX_TORQUE_LIMIT, 400)  # locked: gone with the power
    put(line, 2, r.LOCK, 0)
    put(line, 2, r.MAX_TORQUE_LIMIT, 500)
    put(line, 2, r.ACCELERATION, 20)
    put(line, 2, r.TORQUE_ENABLE, 1)
    assert get(line, 2, r.TORQUE_LIMIT) == 1000  # the EEPROM limit becomes live at power-up only
    for servo in line.servos.values():
        servo.set_power(False)
    assert ask(line, codec.ping(codec.BROADCAST)) == []
    for servo in line.servos.values():
        servo.set_power(True)
    assert [get(line, id, r.MAX_TORQUE_LIMIT) for id in (1, 2)] == [1000, 500]
    assert get(line, 2, r.TORQUE_LIMIT) == 500
    assert get(line, 2, r.ACCELERATION) == get(line, 2, r.TORQUE_ENABLE) == 0
    assert get(line, 2, r.LOCK) == 1


def test_read_only_registers_stay():
    line = bus()
    put(line, 1, r.PRESENT_POSITION, 7)
    put(line, 1, r.MODEL_NUMBER, 7)
    assert get(line, 1, r.PRESENT_POSITION) == 2048 and get(line, 1, r.MODEL_NUMBER) == 777


def test_a_changed_id_answers_under_the_new_one():
    line = bus()
    put(line, 3, r.ID, 8)
    assert ask(line, codec.ping(3)) == [] and ask(line, codec.ping(8)) == [Packet(8, 0)]


def test_the_homing_offset_shifts_what_is_read_and_commanded():
    line = bus(1)
    put(line, 1, r.HOMING_OFFSET, -100)
    assert get(line, 1, r.PRESENT_POSITION) == 2148
    put(line, 1, r.TORQUE_ENABLE, 1)
    put(line, 1, r.GOAL_POSITION, 2000)
    run(line, 1.0)
    assert line.servos[1].encoder == pytest.approx(1900, abs=1)


def run(line: EmulatedLine, seconds: float, dt: float = 0.004) -> list[float]:
    """Positions of servo 1."""
    path = []
    for _ in range(round(seconds / dt)):
        line.tick(dt)
        path.append(line.servos[1].encoder)
    return path


def test_motion_is_the_trapezoid_of_the_servos_own_limits():
    """1000 steps at 1000 steps/s and 2000 steps/s²: 0.5 s up (250 steps), 0.5 s flat, 0.5 s down."""
    line = bus(1)
    put(line, 1, r.ACCELERATION, 20)
    put(line, 1, r.GOAL_VELOCITY, 1000)
    put(line, 1, r.TORQUE_ENABLE, 1)
    put(line, 1, r.GOAL_POSITION, 3048)
    path = run(line, 2.0)
    assert path[124] - 2048 == pytest.approx(250, abs=8)
    assert path[249] - 2048 == pytest.approx(750, abs=8)
    assert max(b - a for a, b in pairwise(path)) / 0.004 == pytest.approx(1000, rel=1e-6)
    assert path[-1] == pytest.approx(3048, abs=0.5) and max(path) < 3049


def test_without_limits_a_servo_is_as_fast_as_it_can_and_stays_in_its_range():
    line = bus(1)
    put(line, 1, r.MAX_POSITION_LIMIT, 3000)
    put(line, 1, r.TORQUE_ENABLE, 1)
    put(line, 1, r.GOAL_POSITION, 4000)
    path = run(line, 1.0)
    assert max(b - a for a, b in pairwise(path)) / 0.004 == pytest.approx(FREE_SPEED)
    assert path[-1] == pytest.approx(3000, abs=0.5)


def test_without_torque_a_joint_falls_and_a_goal_does_not_move_it():
    line = EmulatedLine([EmulatedServo(1, falls_to=1000.0)])
    put(line, 1, r.GOAL_POSITION, 3000)
    assert run(line, 2.0)[-1] == 1000
    put(line, 1, r.TORQUE_ENABLE, 1)  # holds where it is
    assert run(line, 0.5)[-1] == pytest.approx(1000, abs=1)


@pytest.mark.parametrize(
    ("world", "condition", "torque"),
    [
        ({"temperature": 80}, r.Condition.OVERHEATING, 0),
        ({"voltage": 3.8}, r.Condition.VOLTAGE, 1),  # not in the unloading mask
    ],
)
def test_conditions_show_in_every_reply_and_may_cut_torque(world, condition, torque):
    line = bus(1)
    put(line, 1, r.TORQUE_ENABLE, 1)
    for name, value in world.items():
        setattr(line.servos[1], name, value)
    run(line, 0.01)
    (reply,) = ask(line, codec.read(1, r.STATUS.address, 1))
    assert reply.code == reply.parameters[0] == condition
    assert line.servos[1].get(r.TORQUE_ENABLE) == torque


def test_a_jammed_joint_overloads_after_its_protection_time_until_torque_is_written():
    line = bus(1)
    put(line, 1, r.TORQUE_ENABLE, 1)
    line.servos[1].jammed = True
    put(line, 1, r.GOAL_POSITION, 2500)
    run(line, 1.9)
    assert ask(line, codec.ping(1)) == [Packet(1, 0)]
    assert get(line, 1, r.PRESENT_LOAD) == 1000
    run(line, 0.2)
    assert ask(line, codec.ping(1)) == [Packet(1, r.Condition.OVERLOAD)]
    assert put(line, 1, r.TORQUE_ENABLE, 0) == [Packet(1, 0)]


def test_injections_damage_what_they_name_and_nothing_else():
    line = bus(2)
    line.injections.append(Injection("drop", servo=2, instruction=codec.Instruction.SYNC_READ, count=2))
    read = codec.sync_read([1, 2], 56, 2)
    assert [[reply.id for reply in ask(line, read)] for _ in range(3)] == [[1], [1], [1, 2]]
    assert ask(line, codec.ping(2)) == [Packet(2, 0)]
    line.injections.append(Injection("corrupt", servo=1))
    assert ask(line, codec.ping(1)) == [] and ask(line, codec.ping(1)) == [Packet(1, 0)]
    line.injections.append(Injection("short"))
    assert ask(line, codec.read(1, 56, 2)) == [Packet(1, 0, b"\x00")]
    line.injections.append(Injection("noise"))
    assert ask(line, codec.ping(1)) == [Packet(1, 0)]
    line.injections.append(Injection("delay", seconds=0.08))
    assert [reply.late for reply in line.answer(read, MEGABAUD)] == [0.08, 0.0]
    line.injections.append(Injection("drop", count=-1, probability=0.25))
    assert 60 < sum(not ask(line, codec.ping(1)) for _ in range(400)) < 140
    with pytest.raises(ValueError, match="unknown kind 'lose'"):
        Injection("lose")


def test_an_unplugged_servo_a_mute_bus_and_an_echoing_adapter():
    line = bus(2)
    line.servos[2].connected = False
    assert [reply.id for reply in ask(line, codec.ping(codec.BROADCAST))] == [1]
    line.echo = True
    assert ask(line, codec.ping(1)) == [codec.ping(1), Packet(1, 0)]
    line.mute = True
    assert ask(line, codec.ping(1)) == []


def test_the_lockstep_beat_is_a_sync_write_of_goals():
    assert is_goal(codec.sync_write(42, {1: b"\0\0"})) and is_goal(codec.sync_write(41, {1: bytes(7)}))
    assert not is_goal(codec.sync_write(46, {1: b"\0\0"})) and not is_goal(codec.write(1, 42, b"\0\0"))
