"""Import names, package list, wheel contents and the rules every source file keeps."""

import ast
import importlib
import importlib.util
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
SOURCES = [
    path for room in ("vla", "sim", "kernels", "robot_drivers") for path in (ROOT / room).rglob("*.py")
]
PERMANENT_FOLDERS = {"vla", "sim", "robot_drivers", "kernels", "tests", "scripts"}


def package_folder(name: str) -> Path:
    """Folder of a package, by the longest entry of the package map."""
    mapping = SETUPTOOLS["package-dir"]
    prefix = max((p for p in mapping if name == p or name.startswith(p + ".")), key=len)
    return ROOT / mapping[prefix] / Path(*name.removeprefix(prefix).strip(".").split("."))


@pytest.mark.parametrize("name", SETUPTOOLS["packages"])
def test_listed_packages_exist_and_resolve_to_this_tree(name):
    folder = package_folder(name)
    assert (folder / "__init__.py").is_file()
    assert Path(importlib.util.find_spec(name).origin).parent.samefile(folder)


def test_every_package_folder_is_listed():
    listed = {package_folder(name).resolve() for name in SETUPTOOLS["packages"]}
    found = {path.parent.resolve() for path in SOURCES}
    assert found <= listed, f"not in pyproject.toml: {sorted(map(str, found - listed))}"


def test_kernels_folder_shadows_nothing():
    """transformers probes for the PyPI package `kernels`; our folder of that name must not answer."""
    assert not (ROOT / "kernels" / "__init__.py").exists() or "vla.kernels" in SETUPTOOLS["packages"]
    spec = importlib.util.find_spec("kernels")
    assert spec is None or Path(spec.origin).is_relative_to(sysconfig.get_path("purelib"))


def test_lerobot_finds_the_plugin():
    name = PROJECT["project"]["name"]
    assert name.startswith("lerobot_policy_")
    importlib.import_module(name)
    from lerobot.configs import PreTrainedConfig

    assert "cogmerge" in PreTrainedConfig.get_known_choices()


def test_top_level_holds_only_the_rooms():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line}
    assert {folder for folder in folders if not folder.startswith(".")} <= PERMANENT_FOLDERS


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_on_a_screen_and_nothing_is_unpickled(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} has more than 80 lines"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "dill", "joblib"} & {name.split(".")[0] for name in names}
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("torch.load", "torch.save", "eval", "exec")
            allowed = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
            assert all(ast.unparse(value) == "False" for value in allowed)
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            last = node.body[-1]
            # Carried to another thread: the error itself is what the handler leaves behind.
            carried = isinstance(last, ast.Assign) and node.name and ast.unparse(last.value) == node.name
            assert not broad or isinstance(last, ast.Raise) or carried, (
                f"line {node.lineno} swallows every error"
            )


@pytest.mark.slow
def test_wheel_holds_modules_and_data(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        tmp_path,
        ROOT,
    ]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"vla/py.typed", "vla/cli.py", "vla/sim/suites.py", "lerobot_policy_cogmerge/__init__.py"}
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = package_folder(package)
        for pattern in patterns:
            files = [path for path in folder.glob(pattern) if path.is_file()]
            expected |= {f"{package.replace('.', '/')}/{path.relative_to(folder)}" for path in files}
    assert expected <= names, sorted(expected - names)
    assert not any(name.startswith(("sim/", "kernels/", "tests/", "robot_drivers/")) for name in names)
