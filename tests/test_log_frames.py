"""Frames of a log, which are made many at a time."""

import io

import pytest
import websocket

from cachix_channels import encode_lines
from cachix_protocol import LogLine, dumps
from cachix_websocket import masked


@pytest.mark.parametrize("sizes", [[], [0], [1, 125, 126, 127], [65535, 65536, 3], [7] * 2000])
def test_frames_are_masked_all_at_once(sizes):
    frames = [
        (1 + index % 2, bytes(range(251)) * (size // 251 + 1)) for index, size in enumerate(sizes)
    ]
    frames = [(opcode, payload[:size]) for (opcode, payload), size in zip(frames, sizes)]
    buffer = io.BytesIO(masked(frames))
    reader = websocket.frame_buffer(buffer.read, True)
    received = [reader.recv_frame() for _ in sizes]
    unmasked = [(frame.opcode, frame.data) for frame in received]
    assert unmasked == frames and buffer.read() == b""
    assert all(frame.fin and frame.mask_value for frame in received)


def test_no_two_frames_have_the_same_mask():
    size = len(masked([(1, b"\0\0\0\0")]))
    sent = masked([(1, b"\0\0\0\0")] * 200)
    assert len({sent[start : start + size] for start in range(0, len(sent), size)}) > 190


@pytest.mark.parametrize(
    "text", ["", 'quotes " and \\', "\t\x1b[1m\x7f", "ü 漢 \U0001f600", "a" * 9000]
)
def test_lines_are_encoded_as_the_protocol_does(text):
    (line,) = encode_lines([text], "2026-01-01T00:00:00.000000Z")
    assert line == dumps(LogLine(text, "2026-01-01T00:00:00.000000Z").to_json())
