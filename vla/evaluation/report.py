"""``report.html``: one file that explains an evaluation to a person, without any external resource."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from vla.atomic import write_text
from vla.evaluation.display import percent
from vla.evaluation.plan import Plan, episode_name
from vla.evaluation.records import ERROR, FAILURE, SUCCESS, EpisodeRecord
from vla.evaluation.routing_trace import RoutingTrace

REPORT_FILE = "report.html"
#: Errors first, then failures: a reader looks for what went wrong.
_ORDER = (ERROR, FAILURE, SUCCESS)
#: The pictures of more tasks than this would make the file heavy and tell nothing new.
_MAX_TRACES = 10


def write_report(
    folder: Path, plan: Plan, records: Sequence[EpisodeRecord], summary: Mapping[str, Any]
) -> Path:
    """Write ``report.html`` from the records and from the films and router traces in `folder`."""
    environment = Environment(loader=PackageLoader("vla.evaluation", "."), autoescape=True, trim_blocks=True)
    environment.filters["percent"] = percent
    page = environment.get_template("report.html.jinja").render(
        summary=summary,
        plan=plan,
        tasks=[_task(task, records) for task in summary["tasks"]],
        episodes=sorted(records, key=lambda record: _ORDER.index(record.status)),
        languages={(task.suite, task.task): task.language for task in plan.tasks},
        films=_films(folder, records),
        traces=_traces(folder, plan),
        provenance=json.dumps(summary["provenance"], indent=2, ensure_ascii=False),
    )
    return write_text(folder / REPORT_FILE, page)


def _task(task: Mapping[str, Any], records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    mine = [r for r in records if (r.suite, r.task) == (task["suite"], task["task"])]
    return dict(task) | {"records": mine}


def _films(folder: Path, records: Sequence[EpisodeRecord]) -> list[dict[str, Any]]:
    """Every film in the folder, failures first."""
    films = []
    for record in sorted(records, key=lambda record: _ORDER.index(record.status)):
        path = folder / "videos" / f"{episode_name(record.episode)}.mp4"
        if path.exists():
            films.append({"record": record, "data": _data_url("video/mp4", path.read_bytes())})
    return films


def _traces(folder: Path, plan: Plan) -> list[dict[str, Any]]:
    """Pictures of what the routers kept in the first query of each task's first episode."""
    traces = []
    for episode in plan.episodes:
        path = folder / "routing" / f"{episode_name(episode)}.npz"
        if path.exists() and len(traces) < _MAX_TRACES:
            traces.append({"episode": episode} | _trace(RoutingTrace.load(path)))
    return traces


def _trace(trace: RoutingTrace) -> dict[str, Any]:
    report = trace.report
    columns = [{"title": "camera", "pictures": [_jpeg(image) for image in trace.images]}]
    for layer in (None, *sorted(report.kept)):
        kept = trace.tokens if layer is None else len(report.kept[layer])
        columns.append(
            {
                "title": "into the decoder" if layer is None else f"layer {layer}",
                "kept": kept,
                "per_camera": _per_camera(trace, layer),
                "pictures": [_jpeg(picture) for picture in trace.pictures(layer)],
            }
        )
    return {"tokens": trace.tokens, "columns": columns}


def _per_camera(trace: RoutingTrace, layer: int | None) -> list[int]:
    report = trace.report
    kept = np.arange(trace.tokens) if layer is None else report.kept[layer]
    return np.bincount(kept // report.tokens_per_camera, minlength=len(report.cameras)).tolist()


def _jpeg(image: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=80)
    return _data_url("image/jpeg", buffer.getvalue())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
