"""Short films of episodes at true speed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

FRAMES_PER_SECOND = 20  # LIBERO's control rate: one frame per control step is true speed


def encode_video(frames: Sequence[np.ndarray], fps: int = FRAMES_PER_SECOND) -> bytes:
    """Encode (H, W, 3) uint8 frames, H and W even, as an H.264 mp4 file."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "26", "preset": "veryfast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"  # the only layout that every browser plays
        stream.time_base = Fraction(1, fps)
        stream.thread_count = 1
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()
