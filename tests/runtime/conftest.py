import sys
from pathlib import Path

# Tests share an arm contract, a checkpoint and fake cameras; importlib mode leaves this folder off sys.path.
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "robot_drivers"))  # for port_wait
