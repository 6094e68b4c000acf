import sys
from pathlib import Path

import pytest

# Worker processes import the scripted policy by name; spawned children inherit sys.path.
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "experts"))  # for tiny_skills


@pytest.fixture
def eval_config(tmp_path):
    """Make an `EvalConfig` of a small evaluation, with overrides."""
    from vla.evaluation.run import EvalConfig

    def make(**options):
        small = {
            "suite": ("libero_object",),
            "tasks": "0,1",
            "init_states": "0-5",
            "out": tmp_path / "out",
            "max_steps": 60,
        }
        return EvalConfig(**small | options)

    return make
