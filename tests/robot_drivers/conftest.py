import sys
from pathlib import Path

# Tests share how they wait for a port; importlib mode leaves this folder off sys.path.
sys.path.append(str(Path(__file__).parent))
