"""What an algorithm does to real tensors: ratio, error and time; to a compressed file and back.

``penstock compress`` and ``python -m penstock.compression`` are two doors to :func:`app_function`.
"""

import argparse
import io
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from penstock._core.files import write_bytes
from penstock.compression.algorithm import CompressionAlgorithm
from penstock.compression.archive import compressed_by, decompress_file, write_compressed
from penstock.compression.registry import algorithms_without_options, create_compression_algorithm
from penstock.compression.tensor_file import TensorFile

_FUSED_ELEMENTS: Final = 1 << 24
_PICTURES: Final = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Measurement:
    """What one algorithm did to a set of tensors.

    Attributes:
        algorithm: Its name.
        bytes_in: Bytes of the floating tensors.
        bytes_out: Bytes of their payloads on the wire.
        relative_error: Norm of the difference over norm of the tensors; 0 for all-zero tensors.
        compress_s: Seconds to compress.
        decompress_s: Seconds to decompress.
        guarantee: The least contraction factor that holds whatever the values; None where none does.
    """

    algorithm: str
    bytes_in: int
    bytes_out: int
    relative_error: float
    compress_s: float
    decompress_s: float
    guarantee: float | None = None

    @property
    def ratio(self) -> float:
        """Bytes in over bytes out; 1 when there is nothing to compress."""
        return self.bytes_in / self.bytes_out if self.bytes_out else 1.0

    @property
    def contraction(self) -> float:
        """The share of the tensors' energy that a receiver has: 1 - the squared relative error."""
        return 1.0 - self.relative_error**2


def measure(tensors: Iterable[Tensor], algorithm: CompressionAlgorithm, *, fused: bool = True) -> Measurement:
    """Compress floating tensors, decompress them and compare; other tensors are left out.

    Args:
        tensors: Of any shapes.
        algorithm: Any algorithm.
        fused: End to end in flat float32 buffers of 64 MiB, as training fuses its buckets; otherwise one by one.
    """
    seen_bytes = [0]
    guarantees: list[float | None] = []

    def floating() -> Iterator[Tensor]:
        for tensor in tensors:
            if tensor.is_floating_point():
                seen_bytes[0] += tensor.numel() * tensor.element_size()
                yield tensor

    # Matrices have to stay matrices for the algorithms that look at their shape.
    together = fused and not algorithm.shaped
    buffers = _fused(floating()) if together else (tensor.detach().float() for tensor in floating())
    bytes_out, error, energy, compress_s, decompress_s = 0, 0.0, 0.0, 0.0, 0.0
    algorithm.decompress(algorithm.compress(torch.zeros(64)), torch.empty(64))  # kernels are compiled when first used
    for buffer in buffers:
        seen = torch.empty_like(buffer, memory_format=torch.contiguous_format)
        start = time.perf_counter()
        payload = algorithm.compress(buffer)
        middle = time.perf_counter()
        algorithm.decompress(payload, seen)
        end = time.perf_counter()
        compress_s += middle - start
        decompress_s += end - middle
        bytes_out += algorithm.bytes_for(buffer.shape)
        error += float((buffer - seen).double().square().sum())
        energy += float(buffer.double().square().sum())
        guarantees.append(algorithm.contraction(buffer.shape))
    proven = [guarantee for guarantee in guarantees if guarantee is not None]
    return Measurement(
        algorithm.name,
        seen_bytes[0],
        bytes_out,
        math.sqrt(error / energy) if energy else 0.0,
        compress_s,
        decompress_s,
        min(proven) if len(proven) == len(guarantees) and proven else None,
    )


def _fused(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors' elements in turn, in buffers that share one storage: a model's copy may not fit beside it."""
    room = torch.empty(_FUSED_ELEMENTS)
    filled = 0
    for tensor in tensors:
        rest = tensor.reshape(-1)
        while rest.numel():
            part = rest[: room.numel() - filled]
            room[filled : filled + part.numel()].copy_(part)
            filled, rest = filled + part.numel(), rest[part.numel() :]
            if filled == room.numel():
                yield room
                filled = 0
    if filled:
        yield room[:filled]


def render(measurements: Sequence[Measurement], *, title: str) -> Table:
    """A table with a line for each algorithm; how much of the energy arrives, and how much always does."""
    table = Table(title=title)
    table.add_column("algorithm", no_wrap=True)
    for column in ("bytes", "ratio", "error", "arrives", "at least", "ms", "ms back"):
        table.add_column(column, justify="right", no_wrap=True)
    for m in measurements:
        table.add_row(
            m.algorithm,
            f"{m.bytes_out:,}",
            f"{m.ratio:.2f}x",
            f"{m.relative_error:.2g}",
            f"{m.contraction:.3g}",
            "-" if m.guarantee is None else f"{m.guarantee:.2g}",
            f"{m.compress_s * 1e3:.1f}",
            f"{m.decompress_s * 1e3:.1f}",
        )
    return table


def draw(measurements: Sequence[Measurement], path: Path, *, title: str) -> None:
    """A picture of error against ratio, a point for each algorithm.

    Raises:
        ValueError: Matplotlib (the extra ``report``) is missing, or the file's ending is of no known format.
    """
    _check_picture(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for m in measurements:
        axes.scatter(m.ratio, m.relative_error)
        axes.annotate(m.algorithm, (m.ratio, m.relative_error), xytext=(4, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="bytes in over bytes out", ylabel="relative error", title=title)
    axes.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower())
    write_bytes(path, drawn.getvalue())


def app_function(
    file: Path,
    *,
    algorithms: Sequence[str] = (),
    options: Mapping[str, bool | int | float | str] | None = None,
    output: Path | None = None,
    picture: Path | None = None,
    decompress: bool = False,
    fused: bool = True,
    overwrite: bool = False,
    console: Console | None = None,
) -> int:
    """Load a file, create the algorithms, compress, and print a table.

    Args:
        file: A ``.safetensors`` file; with ``decompress``, one that this function wrote.
        algorithms: Names; none means every registered algorithm.
        options: Options of the algorithm; needs exactly one algorithm.
        output: Write the compressed tensors (or, with ``decompress``, the decompressed ones) there.
        picture: Draw error against ratio there, a ``.png``, ``.svg`` or ``.pdf``; needs the extra ``report``.
        decompress: Turn a compressed file back into a plain one.
        fused: Measure the tensors end to end rather than one by one.
        overwrite: Replace the file at ``output`` if there is one; never ``file`` itself.
        console: Where to print; standard output by default.

    Returns:
        0, the process's exit code.

    Raises:
        ValueError: A file, name or option is wrong, or the arguments do not go together.
    """
    console = console or Console()
    if decompress:
        if output is None:
            raise ValueError("decompressing needs a place to write to: give --output FILE")
        if algorithms or options or picture:
            raise ValueError(
                "a compressed file says which algorithm wrote it: leave out --algorithm, --option and --plot"
            )
        _check_output(file, output, overwrite=overwrite)
        console.print(f"{output}: {decompress_file(file, output)} tensors decompressed")
        return 0
    if (options or output) and len(algorithms) != 1:
        what = "--output" if output else "--option"
        raise ValueError(f"{what} needs exactly one --algorithm, got {len(algorithms)}")
    if output is not None:
        _check_output(file, output, overwrite=overwrite)
    if picture is not None:
        _check_picture(picture)
        _check_output(file, picture, overwrite=overwrite)
    makeable, needing = algorithms_without_options()
    if needing and not algorithms:
        console.print(f"left out, because they need options: {', '.join(needing)}")
    chosen = [create_compression_algorithm(name, options) for name in algorithms or makeable]
    tensors = TensorFile(file)
    former = compressed_by(tensors.metadata)
    if former is not None:
        raise ValueError(
            f"{file}: already compressed, with {former}; "
            f"turn it back first: penstock compress {file} --decompress --output FILE"
        )
    bytes_before = file.stat().st_size
    floating = len(tensors.floating_shapes())
    if not floating:
        raise ValueError(f"{file}: none of its {len(tensors)} tensors is floating, so there is nothing to compress")
    title = f"{file.name}: {floating} floating tensors of {len(tensors)}"
    measured = [measure(tensors.values(), algorithm, fused=fused) for algorithm in chosen]
    console.print(render(measured, title=title))
    if not all(math.isfinite(found.relative_error) for found in measured):
        names = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor.float()).all())]
        console.print(f"NaN or infinite, so errors say nothing; such a tensor is written as it is: {', '.join(names)}")
    if picture is not None:
        draw(measured, picture, title=title)
        console.print(f"{picture}: error against ratio")
    if output is not None:
        written = write_compressed(output, tensors, chosen[0], metadata=tensors.metadata)
        console.print(f"{output}: {written:,} bytes, from {bytes_before:,}")
    return 0


def _check_picture(path: Path) -> None:
    """Refuse, before anything is measured, a picture that could not be drawn."""
    if path.suffix.lower() not in _PICTURES:
        raise ValueError(f"{path}: a picture is a .png, .svg or .pdf; give --plot a name that ends so")
    if find_spec("matplotlib") is None:
        raise ValueError('a picture needs matplotlib: pip install "penstock[report]"')


def _check_output(file: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse what would be lost by writing: the input, a file that is there, what is not a file."""
    if not output.exists():
        return
    if file.exists() and output.samefile(file):
        raise ValueError(f"{output}: the output is the input itself; give --output another name")
    if not output.is_file():
        raise ValueError(f"{output}: not a file that can be replaced; give --output another name")
    if not overwrite:
        raise ValueError(f"{output}: there is such a file already; give --overwrite to replace it, or another --output")


def parse_option(text: str) -> tuple[str, bool | int | float | str]:
    """``"block_size=2048"`` to ``("block_size", 2048)``: true or false, an integer, a float, or else the text."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"an option is NAME=VALUE, for example block_size=2048; got {text!r}")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments and run :func:`app_function`; returns the exit code, 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m penstock.compression",
        description="Compress the tensors of a safetensors file; report ratio, relative error and time.",
        epilog="example: python -m penstock.compression model.safetensors --algorithm onebit --option block_size=2048",
    )
    parser.add_argument("file", type=Path, help="a .safetensors file")
    parser.add_argument(
        "--algorithm", "-a", action="append", default=[], metavar="NAME", help="repeatable; default: all"
    )
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the algorithm")
    parser.add_argument("--output", "-o", type=Path, help="write the compressed (or decompressed) tensors here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw error against ratio (.png, .svg, .pdf)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if there is one")
    parser.add_argument("--decompress", action="store_true", help="turn a compressed file back into a plain one")
    parser.add_argument("--per-tensor", action="store_true", help="measure tensor by tensor, not end to end")
    arguments = parser.parse_args(argv)
    try:
        return app_function(
            arguments.file,
            algorithms=arguments.algorithm,
            options=dict(parse_option(text) for text in arguments.option),
            output=arguments.output,
            picture=arguments.plot,
            decompress=arguments.decompress,
            fused=not arguments.per_tensor,
            overwrite=arguments.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
