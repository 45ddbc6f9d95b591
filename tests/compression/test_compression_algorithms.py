import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock.compression import (
    CompressionAlgorithm,
    CompressionConfig,
    CompressionModule,
    Payload,
    PayloadField,
    create_compression_algorithm,
    get_compression_class,
    get_compression_module,
    known_algorithms,
    register_compression_module,
)
from penstock.compression import registry as registry_module
from penstock.compression.algorithm import wire_bytes, wire_views, write_wire
from penstock.compression.algorithms import Bf16, Fp16, NoCompression, OneBit

BUILT_IN = [
    *("bf16", "dct_topk", "fp16", "fp8", "int2", "int4", "int8"),
    *("none", "onebit", "powersgd", "randomk", "topk", "topk_int2"),
]


class Halve(CompressionAlgorithm):
    """Sends half of each element, so that there is always something left."""

    name = "halve"

    def __init__(self, *, factor: float = 0.5) -> None:
        self.factor = factor

    def payload_layout(self, numel: int) -> Sequence[PayloadField]:
        return [PayloadField("halves", torch.float32, (numel,))]

    def compress(self, tensor: Tensor) -> Payload:
        return {"halves": (tensor.reshape(-1) * self.factor).float()}

    def decompress(self, payload: Payload, out: Tensor) -> Tensor:
        return out.copy_(payload["halves"].view(out.shape))


class Unfinished(CompressionAlgorithm):
    name = "unfinished"


@pytest.fixture
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_classes", dict(registry_module._classes))


@pytest.mark.parametrize("name", BUILT_IN)
@given(numel=st.integers(0, 3000), seed=st.integers(0, 100))
def test_a_payload_survives_its_wire(name: str, numel: int, seed: int) -> None:
    algorithm = create_compression_algorithm(name)
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    layout = algorithm.payload_layout(numel)
    wire = torch.full((wire_bytes(layout),), 0xFF, dtype=torch.uint8)
    assert wire.numel() == algorithm.bytes_for(x.shape)
    payload = algorithm.compress(x)
    write_wire(wire, payload, layout)
    read = wire_views(wire, layout)
    assert read.keys() == payload.keys()
    assert all(torch.equal(read[field], payload[field]) for field in payload)
    assert torch.equal(
        algorithm.decompress(read, torch.empty_like(x)), algorithm.decompress(payload, torch.empty_like(x))
    )


@pytest.mark.parametrize(("cls", "dtype"), [(Fp16, torch.float16), (Bf16, torch.bfloat16)])
def test_casts_round_as_torch_does(cls: type[CompressionAlgorithm], dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 100
    out = cls().decompress(cls().compress(x), torch.empty_like(x))
    assert torch.equal(out, x.to(dtype).float())


def test_fp16_overflow_is_seen_and_not_remembered() -> None:
    x = torch.tensor([1e6, 1.0, -1e6, 1e-9])
    left = torch.tensor([0.5, 0.0, 0.25, 0.0])
    payload = Fp16().compress_with_memory(x, left)
    assert payload["values"].tolist() == [math.inf, 1.0, -math.inf, 0.0]
    assert left.tolist() == [0.5, 0.0, 0.25, pytest.approx(1e-9)]


def test_none_keeps_every_bit() -> None:
    x = torch.randn(100)
    assert torch.equal(NoCompression().decompress(NoCompression().compress(x), torch.empty_like(x)), x)
    half = x.bfloat16()
    assert torch.equal(NoCompression().decompress(NoCompression().compress(half), torch.empty_like(half)), half)
    with pytest.raises(ValueError, match="float64"):
        NoCompression().compress(x.double())


def test_a_payload_that_breaks_its_promise_is_refused() -> None:
    layout = [PayloadField("a", torch.uint8, (3,))]
    wire = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"payload holds \['b'\].*promises \['a'\]"):
        write_wire(wire, {"b": torch.zeros(3, dtype=torch.uint8)}, layout)
    with pytest.raises(ValueError, match=r"'a' is torch.uint8 \(4,\)"):
        write_wire(wire, {"a": torch.zeros(4, dtype=torch.uint8)}, layout)


@pytest.mark.usefixtures("_registry")
def test_registering_a_users_algorithm() -> None:
    register_compression_module("halve", Halve)
    register_compression_module("halve", Halve)
    assert get_compression_class("halve") is Halve
    made = create_compression_algorithm("halve", {"factor": 0.25})
    assert made.options() == {"factor": 0.25}
    module = get_compression_module("halve")
    x = torch.ones(4)
    assert module(x).tolist() == [0.5] * 4
    assert module(x).tolist() == [0.75] * 4  # what was left comes along
    assert CompressionConfig(algorithm="halve", options={"factor": 0.1}).create().options() == {"factor": 0.1}
    with pytest.raises(ValueError, match=r"'halve' is already registered as .*Halve; register .*OneBit"):
        register_compression_module("halve", OneBit)


def test_what_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="not a subclass of CompressionAlgorithm"):
        register_compression_module("x", dict)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not implement compress, decompress, payload_layout"):
        register_compression_module("x", Unfinished)
    with pytest.raises(ValueError, match="empty name"):
        register_compression_module("", Halve)


def test_the_built_in_names() -> None:
    assert [name for name in known_algorithms() if name in BUILT_IN] == BUILT_IN
    assert [get_compression_class(name).name for name in BUILT_IN] == BUILT_IN


def test_unknown_names_point_at_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown compression algorithm 'onebt'; did you mean 'onebit'\? Known: bf16"):
        create_compression_algorithm("onebt")
    with pytest.raises(ValueError, match=r"'blocksize'; did you mean 'block_size'\? Known: block_size, scale"):
        create_compression_algorithm("onebit", {"blocksize": 8})
    with pytest.raises(ValueError, match=r"unknown option of compression algorithm 'fp16': 'block_size'.*\(none\)"):
        create_compression_algorithm("fp16", {"block_size": 8})


def test_the_configuration_checks_everything_at_once() -> None:
    assert isinstance(CompressionConfig().create(), OneBit)
    with pytest.raises(ValueError, match="did you mean 'onebit'"):
        CompressionConfig(algorithm="onbit")
    with pytest.raises(ValueError, match="multiple of 8"):
        CompressionConfig(options={"block_size": 3})
    with pytest.raises(ValueError, match="unknown key 'algoritm'; did you mean 'algorithm'"):
        CompressionConfig.model_validate({"algoritm": "none"})


class Nameless(Halve):
    name = "another"


class Forgetful(Halve):
    name = "forgetful"

    def __init__(self, *, ratio: float = 0.5) -> None:
        super().__init__(factor=ratio)


def test_a_class_must_be_found_again_by_what_it_says_of_itself() -> None:
    with pytest.raises(ValueError, match="cannot register Nameless as 'halved': its attribute name is 'another'"):
        register_compression_module("halved", Nameless)
    assert "halved" not in known_algorithms()
    register_compression_module("forgetful", Forgetful)
    with pytest.raises(ValueError, match=r"takes the option 'ratio' but has no attribute .* set self.ratio"):
        create_compression_algorithm("forgetful", {"ratio": 0.25})


@pytest.mark.parametrize("block_size", ["abc", 1024.0, 1000.0, True, None, 4, 12])
def test_a_block_is_a_whole_number_of_bytes(block_size: object) -> None:
    with pytest.raises(ValueError, match="block_size must be a positive multiple of 8"):
        create_compression_algorithm("onebit", {"block_size": block_size})


class Share(Halve):
    """As :class:`Halve`, of a factor that has to be given."""

    name = "share"

    def __init__(self, *, factor: float) -> None:
        super().__init__(factor=factor)


@pytest.mark.usefixtures("_registry")
def test_an_algorithm_that_needs_an_option_says_so_and_holds_up_no_list() -> None:
    register_compression_module("share", Share)
    with pytest.raises(ValueError, match="'share' needs the option factor, which has no default"):
        create_compression_algorithm("share")
    assert create_compression_algorithm("share", {"factor": 0.25}).options() == {"factor": 0.25}
    makeable, needing = registry_module.algorithms_without_options()
    assert needing == ["share"]
    assert sorted([*makeable, *needing]) == known_algorithms()


def test_powersgd_without_a_memory_tells_tensors_of_one_name_apart() -> None:
    module = CompressionModule(create_compression_algorithm("powersgd", {"rank": 2}), error_feedback=False)
    module.compress(torch.randn(20, 30), "weight")
    with pytest.raises(ValueError, match=r"'weight' was of another shape before, now it is of \(30, 20\)"):
        module.compress(torch.randn(30, 20), "weight")
