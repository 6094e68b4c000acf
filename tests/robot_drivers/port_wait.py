"""What tests of arms share: a port is free a moment after the last joint was released."""

from vla.robot_drivers import Arm, Disconnected, RobotDriver


def opens(arm: Arm | RobotDriver) -> bool:
    """Whether the port could be taken; it may not be free yet."""
    try:
        arm.open()
    except Disconnected:
        return False
    return True
