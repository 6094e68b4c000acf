"""The emulated bus as its users see it: a serial port, a steering socket, and no process left behind."""

import os
import time

import pytest
import serial

from vla.robot_drivers.emulation import Emulator
from vla.robot_drivers.emulation.emulator import EmulatorError
from vla.robot_drivers.so101 import codec
from vla.robot_drivers.so101 import registers as r
from vla.robot_drivers.so101.codec import Packet, PacketReader

PATIENCE = 10.0  # s; what a loaded machine may need for a reply


def ask(port: serial.Serial, command: Packet, replies: int = 1) -> list[Packet]:
    port.write(command.encode())
    reader, found, end = PacketReader(), [], time.monotonic() + PATIENCE
    while len(found) < replies and time.monotonic() < end:
        found += reader.feed(port.read(max(1, port.in_waiting)))
    return found


def goals(values: dict[int, int]) -> Packet:
    return codec.sync_write(r.GOAL_POSITION.address, {k: r.GOAL_POSITION.pack(v) for k, v in values.items()})


def positions(port: serial.Serial, ids=(1, 2)) -> list[int]:
    replies = ask(port, codec.sync_read(ids, r.PRESENT_POSITION.address, 2), len(ids))
    return [r.PRESENT_POSITION.unpack(reply.parameters) for reply in replies]


def test_lockstep_runs_are_equal_to_the_bit():
    def run() -> list[list[int]]:
        with Emulator(2, lockstep=0.01) as bus, serial.Serial(bus.port, 1_000_000, timeout=0.05) as port:
            for id in (1, 2):
                assert ask(port, codec.write(id, r.TORQUE_ENABLE.address, b"\x01")) == [Packet(id, 0)]
            path = []
            for k in range(40):
                port.write(goals({1: 2048 + 20 * k, 2: 2048 - 300 * (k > 10)}).encode())
                path.append(positions(port))
            time.sleep(0.1)  # a lockstep world does not move with the clock
            assert positions(port) == path[-1]
            assert bus.servos()[1]["encoder"] == pytest.approx(path[-1][0], abs=0.51)
            return path

    first = run()
    assert first == run()
    assert first[-1][0] > 2600 and first[-1][1] == 1748


def test_in_real_time_the_world_moves_with_the_clock():
    with Emulator(1) as bus, serial.Serial(bus.port, 1_000_000, timeout=0.05) as port:
        ask(port, codec.write(1, r.TORQUE_ENABLE.address, b"\x01"))
        ask(port, codec.write(1, r.GOAL_VELOCITY.address, r.GOAL_VELOCITY.pack(500)))
        port.write(goals({1: 3048}).encode())
        begin = time.monotonic()
        while positions(port, (1,)) != [3048]:
            assert time.monotonic() - begin < 60
        assert time.monotonic() - begin > 1.9  # 1000 steps at 500 steps/s
        trace = bus.trace()
        assert trace[0] == {"id": 1, "code": codec.Instruction.WRITE, "parameters": [40, 1]}


def test_the_rate_of_the_port_counts():
    with Emulator(1, lockstep=0.01) as bus, serial.Serial(bus.port, 115_200, timeout=0.3) as port:
        port.write(codec.ping(1).encode())
        assert port.read(1) == b""
        port.baudrate = 1_000_000
        assert ask(port, codec.ping(1)) == [Packet(1, 0)]


def test_the_adapter_can_be_pulled_out_and_plugged_in_again():
    with Emulator(1, lockstep=0.01) as bus:
        port = serial.Serial(bus.port, 1_000_000, timeout=0.05)
        assert ask(port, codec.ping(1)) == [Packet(1, 0)]
        bus.request("hangup")
        assert not os.path.lexists(bus.port)
        with pytest.raises((OSError, serial.SerialException)):
            ask(port, codec.ping(1))
        bus.request("replug")
        with serial.Serial(bus.port, 1_000_000, timeout=0.05) as again:
            assert ask(again, codec.ping(1)) == [Packet(1, 0)]
        port.close()


def test_steering_sets_and_reports_and_refuses_nonsense():
    with Emulator([{"encoder": 1500}, {}], lockstep=0.01) as bus:
        bus.set(2, temperature=80, registers={"GOAL_POSITION": 1234, "TORQUE_ENABLE": 1})
        bus.advance(0.01)
        servos = bus.servos()
        assert servos[1]["encoder"] == 1500 and servos[1]["registers"]["PRESENT_POSITION"] == 1500
        assert servos[2]["registers"]["GOAL_POSITION"] == 1234
        assert bus.registers("TORQUE_ENABLE") == [0, 0]  # overheated: cut
        for wrong in ({"servo": 7}, {"servo": 1, "colour": 3}, {"servo": 1, "registers": {"NO": 1}}):
            with pytest.raises(EmulatorError, match="refused 'set'"):
                bus.request("set", **wrong)
        with pytest.raises(EmulatorError, match="unknown op 'dance'"):
            bus.request("dance")
        assert bus.registers("ID") == [1, 2]  # still serves


def test_a_temperature_between_two_degrees_is_told_in_whole_ones():
    with Emulator(1, lockstep=0.01) as bus:
        bus.set(1, temperature=41.6)
        bus.advance(0.01)
        assert bus.registers("PRESENT_TEMPERATURE") == [42]


def test_the_process_ends_with_its_steering_connection():
    bus = Emulator(1, lockstep=0.01)
    bus._connection.shutdown(2)  # as if this process had been killed
    assert bus._processes[0].wait(timeout=60) == 0
    with pytest.raises(EmulatorError):
        bus.servos()
    bus.close()
    assert not os.path.exists(os.path.dirname(bus.port))


def test_a_configuration_that_cannot_be_is_one_sentence():
    with pytest.raises(EmulatorError, match=r"did not start: .*colour"):
        Emulator([{"colour": 3}])
