"""The layout of a checkpoint: what any number of ranks wrote is read whole or in parts, and lies are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distgan.checkpoint import layout
from distgan.checkpoint.directory import Manifest, verify, write_file
from distgan.checkpoint.merging import merge
from distgan.checkpoint.snapshot import Snapshot
from distgan.distributed.parts import Held, Part, own_part
from distgan.errors import UserError
from tests.checkpoints import rewrite

Sets = dict[str, dict[str, Tensor]]


def write(path: Path, ranks: list[dict[str, dict[str, Held]]]) -> None:
    """A checkpoint as ranks with these tensors, or parts of them, write it."""
    path.mkdir()
    files, written, parts = {}, [], {}
    for rank, sets in enumerate(ranks):
        parts = {name: {key: own_part(held, rank, len(ranks)) for key, held in of.items()} for name, of in sets.items()}
        written.append({})
        for name, of in parts.items():
            own = {key: part.values for key, part in of.items() if layout.is_written(part, rank)}
            written[-1][name] = {key: (of[key].start, values.numel()) for key, values in own.items()}
            snapshot, file = Snapshot(), layout.file_name(name, rank + 1, len(ranks))
            snapshot.copy(own)
            if own:
                files[file] = write_file(path / file, snapshot.chunks())
    content = layout.make_layout(parts, written).model_dump_json().encode()
    files[layout.FILE] = write_file(path / layout.FILE, [content])
    files["state.json"] = write_file(path / "state.json", [b'{"step": 3}'])
    write_file(path / "manifest.json", [Manifest(step=3, files=files).model_dump_json().encode()])


def cut(tensor: Tensor, ends: list[int]) -> list[Held]:
    """A tensor in flat parts that end there, as DeepSpeed's shards do."""
    starts = [0, *ends]
    flat = tensor.reshape(-1)
    return [
        Part(flat[a:b], a, tensor.shape) for a, b in zip(starts, [*ends, tensor.numel()], strict=True)
    ]  # fmt: skip


shapes = st.lists(st.integers(0, 7), max_size=3).map(lambda shape: [50 * size for size in shape[:1]] + shape[1:])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])


@settings(max_examples=30, deadline=None)
@given(
    tensors=st.lists(st.tuples(shapes, dtypes, st.booleans()), max_size=4), world_size=st.integers(1, 5), data=st.data()
)
def test_any_division_is_read_whole_and_in_any_parts(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[Any], world_size: int, data: st.DataObject
) -> None:
    """Replicated tensors of any strides, whose rows the ranks divide, and others in flat parts cut anywhere."""
    path = tmp_path_factory.mktemp("layout") / "step-00000003"
    whole, ranks = {}, [dict[str, Held]() for _ in range(world_size)]
    for number, (shape, dtype, replicated) in enumerate(tensors):
        tensor = (100 * torch.rand(shape)).to(dtype)
        tensor = tensor.transpose(0, -1) if tensor.dim() > 1 and replicated else tensor
        whole[f"tensor {number}"] = tensor
        ends = [] if replicated else [data.draw(st.integers(0, tensor.numel())) for _ in range(world_size - 1)]
        cuts: list[Held] = [tensor] * world_size if replicated else cut(tensor, sorted(ends))
        for rank, held in zip(ranks, cuts, strict=True):
            rank[f"tensor {number}"] = held
    write(path, [{"weights": tensors, "empty": {}} for tensors in ranks])
    verify(path)
    found = layout.read_sets(path, ["weights", "empty"])
    assert found["weights"].keys() == whole.keys()
    assert found["empty"] == {}
    for key, tensor in whole.items():
        stored = found["weights"][key]
        assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(stored.whole(), tensor)
        start = data.draw(st.integers(0, tensor.numel()))
        stop = data.draw(st.integers(start, tensor.numel()))
        assert torch.equal(stored.elements(start, stop), tensor.reshape(-1)[start:stop])
    merged = merge(path, path.with_name("merged"))
    verify(merged)
    # Nothing of this package: any reader of the format takes it.
    plain = safetensors.torch.load_file(merged / "weights.1-of-1.safetensors") if whole else {}
    assert plain.keys() == whole.keys()
    assert all(plain[key].dtype == value.dtype and torch.equal(plain[key], value) for key, value in whole.items())


def test_ranks_share_the_bytes_of_what_they_all_have() -> None:
    """And rank 0 alone has what is small, or has no rows."""
    large, small, single = torch.zeros(101, 500), torch.zeros(10), torch.zeros(1, 5000)
    shares = [own_part(large, rank, 4) for rank in range(4)]
    assert [share.values.shape[0] for share in shares] == [26, 26, 26, 23]
    assert [share.start for share in shares] == [0, 13_000, 26_000, 39_000]
    assert all(share.values.untyped_storage().data_ptr() == large.data_ptr() for share in shares), "not copies"
    for tensor in (small, single, torch.zeros(())):
        assert [own_part(tensor, rank, 4).values.numel() for rank in range(4)] == [tensor.numel(), 0, 0, 0]


def changed(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = to

    return change


def entry(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    return changed("sets", "weights", "matrix", *keys, to=to)


VALID = {"dtype": "F32", "shape": [60, 50], "parts": [[1, 0], [2, 1500]]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (entry("parts", to=[[1, 0]]), "F32, elements 0 to 3000, but weights.1-of-2"),
        (entry("parts", to=[[2, 0], [1, 1500]]), None),  # rows of another rank: what the layout says is not provable
        (entry("parts", to=[[1, 0], [2, 1450]]), "F32, elements 0 to 1450, but weights.1-of-2"),
        (entry("parts", to=[[1, 1], [2, 1500]]), "parts that start at [1, 1500], expected rising"),
        (entry("parts", to=[[1, 0], [2, 0]]), "parts that start at [0, 0]"),
        (entry("parts", to=[[1, 0], [2, 3000]]), "parts that start at [0, 3000]"),
        (entry("parts", to=[[2, 1500], [1, 0]]), "parts that start at [1500, 0]"),
        (entry("parts", to=[[1, 0], [1, 1500]]), "two parts in one file"),
        (entry("parts", to=[[1, 0], [3, 1500]]), "names weights.3-of-2.safetensors, which manifest.json does not"),
        (entry("parts", to=[[0, 0], [1, 1500]]), "parts.0.0: Input should be greater"),
        (entry("parts", to=[[1, -1], [2, 1500]]), "parts.0.1: Input should be greater"),
        (entry("parts", to=[]), "parts: List should have at least 1 item"),
        (entry("shape", to=[60, 51]), "F32, elements 1500 to 3060, but weights.2-of-2"),
        (entry("shape", to=[2**61, 2**61]), "too many elements"),
        (entry("shape", to=[-60, -50]), "shape.0: Input should be greater"),
        (entry("shape", to=[60.0, 50]), "shape.0: Input should be a valid integer"),
        (entry("dtype", to="I32"), "I32, elements 0 to 1500, but weights.1-of-2.safetensors has torch.float32"),
        (entry("dtype", to="OBJECT"), "dtype: Input should be 'F64'"),
        (changed("sets", "weights", to={}), None),
        (changed("sets", "weights", "other", to=VALID), "other: found weights.1-of-2.safetensors does not have it"),
        (changed("sets", "weights", to={"other": VALID}), "matrix: found weights.1-of-2.safetensors has it"),
        (changed("sets", "../weights", to={}), "sets.../weights.[key]: String should match"),
        (changed("sets", "a/b", to={}), "String should match"),
        (changed("world_size", to=3), "names weights.1-of-3.safetensors, which manifest.json does not"),
        (changed("world_size", to=0), "world_size: Input should be greater"),
        (changed("version", to=2), "version: Input should be 1"),
        (changed("more", to=2), "more: Extra inputs are not permitted"),
    ],
)
def test_a_layout_that_lies_is_refused(tmp_path: Path, change: Callable[[Any], None], said: str | None) -> None:
    """By somebody who knows the manifest, so that `verify` passes. None: the layout is possible."""
    path = tmp_path / "step-00000003"
    write(path, [{"weights": {"matrix": torch.rand(60, 50)}}] * 2)
    document = json.loads((path / layout.FILE).read_text())
    assert document["sets"]["weights"]["matrix"] == VALID
    change(document)
    rewrite(path, layout.FILE, json.dumps(document).encode())
    verify(path)
    if said is None:
        layout.read_sets(path, ["weights"])
        return
    with pytest.raises(UserError) as caught:
        layout.read_sets(path, ["weights"])
    assert str(caught.value).startswith(f"{path / layout.FILE}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_shortened_shard_is_found(tmp_path: Path) -> None:
    path = tmp_path / "step-00000003"
    write(path, [{"weights": {"matrix": torch.rand(60, 50)}}] * 3)
    shard = path / "weights.2-of-3.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"weights\.2-of-3\.safetensors: damaged: found \d+ bytes"):
        verify(path)
    shard.unlink()
    with pytest.raises(UserError, match=r"weights\.2-of-3\.safetensors: cannot be read"):
        verify(path)
    with pytest.raises(UserError, match=r"weights\.2-of-3\.safetensors: not a readable safetensors file"):
        layout.read_sets(path, ["weights"])


def test_ranks_that_do_not_write_all_of_a_tensor_publish_nothing() -> None:
    part = Part(torch.zeros(5), 0, torch.Size([10]))
    for written in ([], [(0, 5)], [(0, 5), (6, 4)], [(0, 5), (4, 6)], [(0, 5), (5, 6)], [(0, 10), (0, 10)]):
        with pytest.raises(ValueError, match=r"did not write each element once|expected rising"):
            layout.make_layout({"a": {"x": part}}, [{"a": {"x": of}} for of in written] or [{"a": {}}])
    assert layout.make_layout({"a": {"x": part}}, [{"a": {"x": (0, 5)}}, {"a": {"x": (5, 5)}}]).world_size == 2


def test_a_merged_checkpoint_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "step-00000003"
    write(path, [{"weights": {"matrix": torch.rand(60, 50)}}] * 2)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: exists; remove it, or name another folder with --out"):
        merge(path, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []
    merged = merge(path, tmp_path / "new" / "merged")
    names = {"weights.1-of-1.safetensors", "layout.json", "manifest.json", "state.json"}
    assert {file.name for file in merged.iterdir()} == names
    assert (merged / "state.json").read_bytes() == (path / "state.json").read_bytes()
    assert [file.name for file in merged.parent.iterdir()] == ["merged"]
