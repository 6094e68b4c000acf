"""The guide for a first-time owner is true: every command in it exists and takes the options it is given."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import vla.robot_drivers
from vla import cli
from vla.robot_drivers.so101 import driver
from vla.runtime.robot import preflight, run
from vla.runtime.robot.joint_mapping import CONVENTIONS

GUIDE = Path(vla.robot_drivers.__file__).parent / "so101" / "OWNERS_GUIDE.md"
TEXT = GUIDE.read_text()


def commands() -> list[str]:
    """Return the commands of the code blocks, and those that are quoted in the text."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    quoted = [it for it in re.findall(r"`([^`\n]+)`", TEXT) if it.startswith(("vla ", "lerobot-"))]
    quoted = [it for it in quoted if it not in CONVENTIONS]
    return [line.split(" #")[0].strip() for line in (*lines, *quoted) if line.strip()]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_of_the_guide_is_taken(command):
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # environment
        words.pop(0)
    if words[0] != "vla":
        assert Path(sys.executable).with_name(words[0]).exists()
        return
    name, arguments = cli._split(words[1:])
    if arguments or name.startswith("robot"):  # `vla run` alone is its name, not a command line
        cli._parse(name, arguments)


def test_the_numbers_of_the_guide_are_those_of_the_code():
    assert driver.VELOCITY == 2.0 and "up to 2 rad/s" in TEXT
    assert preflight.HOTTEST == 60.0 and "above 60 °C" in TEXT
    assert run.DRY_SECONDS == 5.0 and "for five seconds what it" in TEXT
    assert run.RunConfig(task="wave").soft_start == 2.0 and "For two seconds it moves slowly" in TEXT
