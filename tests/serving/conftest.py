import sys
from pathlib import Path

# The tests share a policy and a server in a thread; importlib mode leaves this folder off sys.path.
sys.path.append(str(Path(__file__).parent))
