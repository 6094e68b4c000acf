from vla.sim import assets


def test_installed_files_are_the_recorded_ones():
    report = assets.verify_assets()
    assert report.ok, str(report)
    assert report.files > 1500
    assert "match" in str(report)


def test_an_altered_and_a_missing_folder_are_named(tmp_path, monkeypatch):
    (tmp_path / "bowl.xml").write_text("<mujoco/>")
    monkeypatch.setattr(assets, "_files", lambda: iter([("assets/bowl", "bowl.xml", tmp_path / "bowl.xml")]))
    monkeypatch.setattr(assets, "HASHES_PATH", tmp_path / "hashes.json")
    assets.record_hashes(tmp_path / "hashes.json")
    assert assets.verify_assets().ok

    (tmp_path / "bowl.xml").write_text("<mujoco> </mujoco>")
    report = assets.verify_assets()
    assert report.altered == ("assets/bowl",) and not report.ok
    assert "assets/bowl (altered)" in str(report) and "Reinstall" in str(report)

    monkeypatch.setattr(assets, "_files", lambda: iter([]))
    assert assets.verify_assets().missing == ("assets/bowl (missing)",)
