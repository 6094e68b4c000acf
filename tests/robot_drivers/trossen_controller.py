"""Run as a program: a simulated WidowX AI controller of `trossen-arm-sim` at the address given, fed by stdin.

Its ports are fixed, so every test session takes an address of its own within 127.0.0.0/8.

Each line is a JSON request, each answer a JSON line: ``{"fault": NAME, "why": …}``, ``{"look": true}`` for
the joints' true positions and modes, ``{"limit": [JOINT, LOW, HIGH]}`` for what it says its limits are.
"""

import json
import sys

from trossen_arm_sim.protocol import ErrorState, Mode
from trossen_arm_sim.server import TrossenArmSimServer
from trossen_arm_sim.sim import WidowXSim


def main() -> None:
    sim = WidowXSim()
    sim.start()
    server = TrossenArmSimServer(sim, host=sys.argv[1])
    server.start()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "fault" in request:
            server.fault(ErrorState[request["fault"]], request["why"])
        if "limit" in request:
            joint, low, high = request["limit"]
            sim.model.actuator_ctrlrange[sim._actuator_ids[joint]] = low, high
        positions = [it.position for it in sim.read_joint_outputs()]
        energised = [mode == Mode.POSITION for mode in server.modes]
        print(json.dumps({"positions": positions, "energised": energised}), flush=True)


if __name__ == "__main__":
    main()
