"""Tensor files against the safetensors library: what one writes the other reads, and damage is a sentence."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vla.errors import UserError
from vla.experts.tensor_stream import Slot, TensorFile, TensorWriter, file_hash

DTYPES = [
    torch.float64, torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
SHAPES = [(), (0,), (3,), (2, 0, 5), (4, 1, 3)]


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype in every shape, wide dtypes first."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{dtype} {shape}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    }


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
        assert torch.equal(actual[name].float(), value.float()), name


def test_the_library_reads_what_is_written_and_the_hash_is_the_files(tmp_path):
    path, content = tmp_path / "out.safetensors", tensors()
    writer = TensorWriter(path, {n: Slot(t.dtype, tuple(t.shape)) for n, t in content.items()}, {"a": "b"})
    for name, tensor in content.items():
        writer.write(name, tensor)
    assert writer.close() == hashlib.sha256(path.read_bytes()).hexdigest() == file_hash(path)
    assert_same(load_file(path), content)
    assert TensorFile(path).metadata == {"format": "pt", "a": "b"}


def test_it_reads_what_the_library_writes(tmp_path):
    path, content = tmp_path / "in.safetensors", tensors()
    save_file(content, path)
    file = TensorFile(path)
    assert list(file) == sorted(content) and len(file) == len(content)
    assert_same(file, content)
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in content.items()}
    with pytest.raises(KeyError):
        file["absent"]


def test_what_was_read_is_the_readers_own(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    file["x"].zero_()
    assert torch.equal(file["x"], torch.ones(3))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read"),
        (lambda path: path.write_bytes(b"\x80\x04K\x01."), "cannot be read"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
    ids=["absent", "cut short", "a pickle", "a folder"],
)
def test_a_damaged_file_is_one_sentence(damage, sentence, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(3)}, path)
    damage(path)
    with pytest.raises(UserError, match=sentence):
        TensorFile(path)


def test_a_dtype_that_torch_would_have_to_convert_is_one_sentence(tmp_path):
    header = json.dumps({"x": {"dtype": "U16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match="holds 'x' as U16"):
        TensorFile(path)


def test_a_file_that_shrinks_after_it_was_opened_is_one_sentence(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(3)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        file["x"]


def test_a_copy_is_the_tensor_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("vla.experts.tensor_stream._PIECE", 5)
    content = tensors()
    save_file(content, tmp_path / "in.safetensors")
    source = TensorFile(tmp_path / "in.safetensors")
    writer = TensorWriter(tmp_path / "out.safetensors", {name: source.slots[name] for name in content})
    for name in content:
        writer.copy(name, source)
    writer.close()
    assert_same(load_file(tmp_path / "out.safetensors"), content)


def test_a_copy_is_of_what_was_announced_and_whole(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "in.safetensors")
    source = TensorFile(tmp_path / "in.safetensors")
    writer = TensorWriter(tmp_path / "out.safetensors", {"x": Slot(torch.float32, (4,))})
    with pytest.raises(ValueError, match="was announced"):
        writer.copy("x", source)
    writer = TensorWriter(tmp_path / "out.safetensors", {"x": Slot(torch.float32, (3,))})
    source.path.write_bytes(source.path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        writer.copy("x", source)


def test_only_what_was_announced_is_written(tmp_path):
    writer = TensorWriter(tmp_path / "x.safetensors", {"x": Slot(torch.float32, (3,))})
    with pytest.raises(ValueError, match="was announced"):
        writer.write("x", torch.ones(4))
    writer = TensorWriter(tmp_path / "x.safetensors", {"x": Slot(torch.float32, (3,))})
    with pytest.raises(ValueError, match="not written"):
        writer.close()
    with pytest.raises(ValueError, match="wider dtypes first"):
        TensorWriter(
            tmp_path / "x.safetensors", {"x": Slot(torch.uint8, (3,)), "y": Slot(torch.float32, (3,))}
        )
