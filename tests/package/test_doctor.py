"""`vla doctor`: it passes here, and names a remedy for whatever is broken."""

import collections

import pytest

from vla import doctor
from vla.errors import UserError
from vla.sim.assets import AssetReport


def test_this_machine_is_ready(capsys):
    doctor.doctor(doctor.DoctorConfig())
    said = capsys.readouterr().out
    for what in ("torch", "lerobot", "mujoco", "rendering", "LIBERO files", "disk", "serial ports"):
        assert what in said


def test_problems_raise_and_print_their_remedy(monkeypatch, capsys):
    broken = doctor.Finding("rendering", "no frame", "install libegl1")
    monkeypatch.setattr(doctor, "checks", lambda config: (lambda: [broken], doctor.python))
    with pytest.raises(UserError, match="not ready: rendering"):
        doctor.doctor(doctor.DoctorConfig())
    assert "install libegl1" in capsys.readouterr().out


def test_optional_findings_do_not_fail(monkeypatch):
    note = doctor.Finding("serial ports", "/dev/ttyACM0", "join dialout", needed=False)
    monkeypatch.setattr(doctor, "checks", lambda config: (lambda: [note],))
    doctor.doctor(doctor.DoctorConfig())


def test_missing_and_outdated_packages_are_found(monkeypatch):
    installed = {"torch": "2.11.0", "mujoco": "2.0.0", doctor.DISTRIBUTION: "0.1.0"}

    def version(name):
        if name not in installed:
            raise doctor.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor, "version", version)
    findings = {finding.what: finding for finding in doctor.packages()}
    assert findings["transformers"].found == "not installed" and findings["transformers"].is_problem
    assert "mujoco<4" in findings["mujoco"].remedy and findings["mujoco"].is_problem
    assert "ray" not in findings  # an extra that nobody asked for
    assert "hf-libero" not in findings


def test_a_rival_of_the_simulator_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "0.1.4")
    assert any(finding.what == "hf-libero" and finding.is_problem for finding in doctor.packages())


def test_no_rendering_backend_is_a_problem_with_a_remedy(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    (finding,) = doctor.rendering()
    assert finding.is_problem and "apt" in finding.remedy


def test_altered_assets_are_a_problem(monkeypatch):
    report = AssetReport(files=1, altered=("assets/scenes",), missing=())
    monkeypatch.setattr("vla.sim.assets.verify_assets", lambda: report)
    (finding,) = doctor.libero()
    assert (
        finding.is_problem and "assets/scenes (altered)" in finding.remedy and "pip install" in finding.remedy
    )


def test_full_disk_is_a_problem(monkeypatch, tmp_path):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(1, 1, 2**30))
    (finding,) = doctor.disk(tmp_path / "not" / "there" / "yet")
    assert finding.is_problem and str(tmp_path) in finding.found
