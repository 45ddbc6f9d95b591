import contextlib
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock._core.files import MANIFEST_NAME, CorruptFileError
from penstock.runtime.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    copy_into,
    latest_complete,
    layer_file,
    list_checkpoints,
    prune,
    rank_file,
    step_name,
)


def layer_tensors(layer: int, step: int) -> dict[str, torch.Tensor]:
    return {
        f"weight:layer_{layer:03d}.w": torch.full((3, 2), float(step + layer)),
        f"exp_avg:layer_{layer:03d}.w": torch.full((3, 2), 0.5, dtype=torch.float64),
    }


def write(directory: Path, step: int, *, layers: int = 2, ranks: int = 1) -> Path:
    """Two ranks' worth of writing, as an engine does it: every rank its own files, then one seals."""
    writers = [CheckpointWriter(directory, step) for _ in range(2)]
    for layer in range(layers):
        writers[layer % 2].write_layer(layer, layer_tensors(layer, step))
    for rank in range(ranks):
        writers[rank % 2].write_rank(rank, {"worker": torch.arange(4.0)})
    return writers[0].seal({"step": step, "tokens": 7 * step}, writers[0].written + writers[1].written)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write(tmp_path, 20, layers=3, ranks=2)
    assert path == tmp_path / "step_00000020"
    found = latest_complete(tmp_path)
    assert found is not None
    assert (found.step, found.layers, found.ranks) == (20, (0, 1, 2), (0, 1))
    for layer in range(3):
        expected = layer_tensors(layer, 20)
        loaded = found.read_layer(layer)
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)
    assert torch.equal(found.read_rank(1)["worker"], torch.arange(4.0))
    assert found.read_state() == {"step": 20, "tokens": 140}
    found.verify()


def test_views_of_one_bucket_and_strided_tensors_are_stored_by_value(tmp_path: Path) -> None:
    bucket = torch.arange(8.0)
    writer = CheckpointWriter(tmp_path, 0)
    tensors = {"a": bucket[:4].view(2, 2), "b": bucket[4:], "whole": bucket, "t": torch.arange(6.0).view(2, 3).t()}
    writer.write_layer(0, tensors)
    loaded = Checkpoint(writer.seal({}, writer.written)).read_layer(0)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    # The file holds each value once per name and nothing else of the bucket.
    assert sum(tensor.untyped_storage().nbytes() for tensor in loaded.values()) == 4 * (4 + 4 + 8 + 6)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert latest_complete(tmp_path / "nowhere") is None
    assert latest_complete(tmp_path) is None
    assert list_checkpoints(tmp_path) == []
    assert prune(tmp_path, 1) == []


class Killed(BaseException):
    """Stands for SIGKILL at a chosen moment."""


@pytest.mark.parametrize("moment", range(8))
def test_killed_at_any_moment_the_former_checkpoint_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Writing is cut off before its n-th rename of a file or directory."""
    write(tmp_path, 10)
    changes = 0

    def counted(original: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal changes
            if changes == moment:
                raise Killed
            changes += 1
            return original(*args, **kwargs)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(Path, "rename", counted(Path.rename))
        try:
            write(tmp_path, 20)
            finished = True
        except Killed:
            finished = False
    found = latest_complete(tmp_path)
    assert found is not None
    found.verify()
    # 2 layers + 1 rank + state + manifest + the directory itself
    assert finished == (moment >= 6)
    assert found.step == (20 if finished else 10)
    # The run that resumes makes the same step again, over what was left.
    write(tmp_path, 20)
    again = latest_complete(tmp_path)
    assert again is not None
    assert again.step == 20
    again.verify()


@pytest.mark.parametrize("moment", range(4))
def test_replacing_a_step_never_leaves_the_run_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    write(tmp_path, 10)
    writer = CheckpointWriter(tmp_path, 10)
    writer.write_layer(0, {"weight:new": torch.zeros(1)})
    changes = 0

    def dying(original: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal changes
            if changes == moment:
                raise Killed
            changes += 1
            return original(*args, **kwargs)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        with contextlib.suppress(Killed):
            writer.seal({"step": 10}, writer.written)
    found = latest_complete(tmp_path)
    assert found is not None
    assert found.step == 10
    found.verify()
    # changes in order: clear the place aside, old aside, new in place, remove the old
    assert found.layers == ((0,) if moment >= 3 else (0, 1))


def test_torn_checkpoints_are_passed_over_with_a_word(tmp_path: Path) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    write(tmp_path, 30)
    write(tmp_path, 40)
    (tmp_path / step_name(40) / MANIFEST_NAME).unlink()
    (tmp_path / step_name(30) / MANIFEST_NAME).write_text("{")
    file = tmp_path / step_name(20) / layer_file(1)
    file.write_bytes(file.read_bytes()[:-1])
    said: list[str] = []
    found = latest_complete(tmp_path, said.append)
    assert found is not None
    assert found.step == 10
    assert [str(tmp_path / step_name(step)) in line for step, line in zip((40, 30, 20), said, strict=True)] == [
        True
    ] * 3


@pytest.mark.parametrize("name", [layer_file(1), rank_file(0), "state.json"])
def test_an_altered_file_is_named_when_it_is_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 5)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    found = latest_complete(tmp_path)  # sizes agree: it takes a checksum to see it
    assert found is not None
    found.read_layer(0)  # the other files are good
    with pytest.raises(CorruptFileError, match=f"{name}: its SHA-256"):
        found.verify()
    with pytest.raises(CorruptFileError, match=f"{name}: its SHA-256"):
        {layer_file(1): lambda: found.read_layer(1), rank_file(0): lambda: found.read_rank(0)}.get(
            name, found.read_state
        )()


def test_a_file_that_goes_missing_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    checkpoint = Checkpoint(path)
    (path / layer_file(1)).unlink()
    with pytest.raises(CorruptFileError, match=r"layer_001\.safetensors: listed in the manifest but missing"):
        checkpoint.read_layer(1)


def test_asking_for_what_is_not_there_says_what_is(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, 5))
    with pytest.raises(CorruptFileError, match=r"no layer 2; it holds 2 layers, 0\.\.1"):
        checkpoint.read_layer(2)
    with pytest.raises(CorruptFileError, match=r"no error memories of rank 3; it holds those of 1 ranks, 0\.\.0"):
        checkpoint.read_rank(3)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="not a complete checkpoint"):
        Checkpoint(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({"files": {}}))
    with pytest.raises(CorruptFileError, match="not the manifest of a penstock-checkpoint"):
        Checkpoint(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text(
        json.dumps({"files": {}, "format": "penstock-checkpoint", "version": 99, "step": 1})
    )
    with pytest.raises(CorruptFileError, match="version 99"):
        Checkpoint(tmp_path)


FILES = [layer_file(0), layer_file(1), rank_file(0), "state.json", MANIFEST_NAME]


@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_no_damage_passes_unseen(
    tmp_path_factory: pytest.TempPathFactory, name: str, where: float, bit: int, cut: bool
) -> None:
    """A bit is flipped, or the rest cut off, anywhere: that is refused by name, or everything reads as before."""
    path = write(tmp_path_factory.mktemp("c"), 5)
    data = bytearray((path / name).read_bytes())
    at = int(where * len(data))
    data[at] ^= 1 << bit
    (path / name).write_bytes(data[:at] if cut else data)
    message = ""
    try:
        checkpoint = Checkpoint(path)
        checkpoint.verify()
        layers = [checkpoint.read_layer(layer) for layer in (0, 1)]
        memories, state = checkpoint.read_rank(0), checkpoint.read_state()
    except CorruptFileError as error:
        message = str(error)
    if message:
        assert str(path) in message
        return
    assert name == MANIFEST_NAME  # white space, for example
    assert checkpoint.step == 5
    expected = [layer_tensors(layer, 5) for layer in (0, 1)]
    assert all(torch.equal(layers[i][key], tensor) for i in (0, 1) for key, tensor in expected[i].items())
    assert torch.equal(memories["worker"], torch.arange(4.0))
    assert state == {"step": 5, "tokens": 35}


def test_sealing_without_a_rank_that_did_not_write_is_refused(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 5)
    writer.write_layer(0, {})
    with pytest.raises(CorruptFileError, match=r"layer_001\.safetensors: no rank wrote"):
        writer.seal({}, [*writer.written, layer_file(1)])
    assert latest_complete(tmp_path) is None


def test_files_left_by_a_killed_run_of_another_layout_do_not_enter(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path, 5).write_rank(7, {"worker": torch.ones(1)})
    path = write(tmp_path, 5)
    assert Checkpoint(path).ranks == (0,)
    assert not (path / rank_file(7)).exists()


def test_prune_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    CheckpointWriter(tmp_path, 15).write_layer(0, {})
    CheckpointWriter(tmp_path, 50).write_layer(0, {})  # being written now
    removed = prune(tmp_path, 2)
    assert sorted(path.name for path in removed) == ["step_00000010", "step_00000015.partial", "step_00000020"]
    names = [entry.path.name for entry in list_checkpoints(tmp_path)]
    assert names == ["step_00000030", "step_00000040", "step_00000050.partial"]


def test_prune_does_not_count_a_torn_one_as_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    (tmp_path / step_name(30) / layer_file(0)).unlink()
    prune(tmp_path, 1)
    found = latest_complete(tmp_path)
    assert found is not None
    assert found.step == 20


def test_prune_refuses_to_keep_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        prune(tmp_path, 0)


def test_copy_into_keeps_the_storage() -> None:
    target = torch.zeros(4, 3).t()
    place = target.data_ptr()
    parameter = torch.nn.Parameter(torch.zeros(2))
    copy_into(target, torch.ones(3, 4), "w")
    copy_into(parameter, torch.ones(2), "p")
    assert target.data_ptr() == place
    assert torch.equal(target, torch.ones(3, 4))
    assert torch.equal(parameter.detach(), torch.ones(2))


@pytest.mark.parametrize("source", [torch.ones(3), torch.ones(2, dtype=torch.float64)])
def test_copy_into_refuses_another_shape_or_dtype(source: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"layer_000\.w: the checkpoint holds float.* needs float32\[2\]"):
        copy_into(torch.zeros(2), source, "layer_000.w")


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    loaded = safetensors.torch.load_file(path / layer_file(1))
    assert torch.equal(loaded["weight:layer_001.w"], torch.full((3, 2), 6.0))
