"""Peak memory of a merge: at most 4 x the largest tensor x the number of experts + 500 MB."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file

from vla.experts.lora_expert import LoraExpert, declare, make_config

LAYERS, M, N, RANK, EXPERTS = 10, 2048, 2048, 4, 4
LARGEST = M * N * 4  # bytes
NAMES = ("a", "b", "c", "d")
LIMIT = 4 * LARGEST * EXPERTS + 500_000_000

#: VmHWM belongs to the address space and starts anew with exec; ru_maxrss would inherit the parent's peak.
PROGRAM = """
import json, re, sys
from pathlib import Path
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
from vla.experts.merge import merge
from vla.experts.recipe import load_recipe
imported = peak()
merge(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
print(json.dumps({"imported": imported, "peak": peak(), "lerobot": "lerobot" in sys.modules}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A base of 168 MB and four experts on all of it."""
    folder = tmp_path_factory.mktemp("memory")
    generator = torch.Generator().manual_seed(0)
    (folder / "base").mkdir()
    weight = torch.randn(M, N, generator=generator)
    save_file({f"layer{i}.weight": weight.clone() for i in range(LAYERS)}, folder / "base/model.safetensors")
    for name in NAMES:
        tensors = {}
        for i in range(LAYERS):
            tensors[f"layer{i}.lora_A.weight"] = torch.randn(RANK, N, generator=generator)
            tensors[f"layer{i}.lora_B.weight"] = torch.randn(M, RANK, generator=generator)
        LoraExpert(make_config({f"layer{i}": RANK for i in range(LAYERS)}, 8), tensors).save(folder / name)
        declare(folder / name, name, folder / "base")
    return folder


@pytest.mark.parametrize(
    "method",
    [
        {"method": "task_arithmetic", "lambda": 0.6},
        pytest.param({"method": "ties", "lambda": 0.6}, marks=pytest.mark.slow),
        pytest.param({"method": "dare", "lambda": 0.6}, marks=pytest.mark.slow),
        pytest.param({"method": "tsv_m", "lambda": 0.6}, marks=pytest.mark.slow),
        pytest.param({"method": "knots", "lambda": 0.6}, marks=pytest.mark.slow),
        pytest.param({"method": "wudi", "lambda": 0.6, "options": {"steps": 5}}, marks=pytest.mark.slow),
        pytest.param({"method": "iso_c", "lambda": 0.6}, marks=pytest.mark.slow),
        pytest.param({"method": "emr"}, marks=pytest.mark.slow),
        pytest.param(
            {"method": "least_squares", "options": {"bits": 2}, "rescale": True}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda entries: entries["method"],
)
def test_peak_memory(model, tmp_path, method):
    recipe = {"version": 1, "base": str(model / "base"), "experts": [str(model / name) for name in NAMES]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | method))
    arguments = [sys.executable, "-c", PROGRAM, tmp_path / "recipe.yaml", tmp_path / "out"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=tmp_path)
    result = json.loads(done.stdout)
    assert result["peak"] < LIMIT
    assert not result["lerobot"], "a merge has no need of it, and no room for it"
    # Importing torch alone takes most of the 500 MB, so the merge's own share is what tells; one that held
    # base and result at once would break it.
    assert result["peak"] - result["imported"] < 4 * LARGEST * EXPERTS < 2 * LAYERS * LARGEST
