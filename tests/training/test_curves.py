import json

from vla.training.curves import draw_curves, success_points


def write_run(out):
    rows = [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, 20)]
    rows += [{"kind": "held_out", "step": 10, "loss": 0.2}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_summary(folder, step, successes, episodes):
    folder.mkdir(parents=True)
    rate = successes / episodes if episodes else None
    total = {"successes": successes, "episodes": episodes, "rate": rate, "interval": [0.1, 0.9], "errors": 0}
    content = {"total": total, "provenance": {"manifest": {"step": step}}}
    (folder / "summary.json").write_text(json.dumps(content))


def test_success_points_come_from_the_evaluations_inside_the_run(tmp_path):
    write_summary(tmp_path / "eval" / "b", 200, 15, 20)
    write_summary(tmp_path / "eval" / "a", 100, 5, 20)
    write_summary(tmp_path / "eval" / "errors_only", 300, 0, 0)
    assert success_points(tmp_path) == [(100, 0.25, 0.1, 0.9), (200, 0.75, 0.1, 0.9)]


def test_the_picture_grows_with_what_is_known(tmp_path):
    empty = draw_curves(tmp_path).read_bytes()
    write_run(tmp_path)
    losses = draw_curves(tmp_path).read_bytes()
    write_summary(tmp_path / "eval", 19, 15, 20)
    success = draw_curves(tmp_path).read_bytes()
    assert all(picture.startswith(b"\x89PNG") for picture in (empty, losses, success))
    assert len({empty, losses, success}) == 3
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["curves.png"]
