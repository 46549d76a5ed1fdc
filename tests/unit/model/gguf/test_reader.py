import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from tunesmith.core.errors import InputError
from tunesmith.model.gguf.reader import read_gguf, read_tensor


@pytest.mark.parametrize("quantize", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_reads_what_the_gguf_package_reads(make_gguf, quantize: str) -> None:
    path = make_gguf(quantize=quantize)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }
    assert ours.metadata == fields
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        expected = gguf.dequantize(other.data, other.tensor_type).reshape(mine.shape)
        np.testing.assert_array_equal(read_tensor(ours, mine), expected)


def test_an_array_longer_than_the_file_is_refused_at_once(tmp_path: Path) -> None:
    key = b"tokenizer.ggml.scores"
    array = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 6, 2**50)
    path = tmp_path / "endless.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    with pytest.raises(InputError, match="does not fit"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable GGUF"),
        (b"PK\x03\x04" + bytes(60), "does not start with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "ends inside its header"),
        (
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q", 1)
            + b"k"
            + struct.pack("<I", 99),
            "type 99",
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_gguf(path)
    assert "broken.gguf" in str(caught.value)


def test_cut_files_are_refused_wherever_they_are_cut(make_gguf, tmp_path: Path) -> None:
    content = make_gguf().read_bytes()
    path = tmp_path / "cut.gguf"
    for length in random.Random(0).sample(range(len(content) - 64), 100):
        path.write_bytes(content[:length])
        with pytest.raises(InputError):
            read_gguf(path)


def test_damaged_headers_raise_nothing_but_input_errors(make_gguf, tmp_path: Path) -> None:
    content = make_gguf().read_bytes()
    chance, path, refused = random.Random(0), tmp_path / "damaged.gguf", 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[chance.randrange(8000)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read_gguf(path)
        except InputError:
            refused += 1
    assert refused > 100
