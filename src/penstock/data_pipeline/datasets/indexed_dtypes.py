"""What the dtype codes of indexed datasets stand for: Megatron-Core's and, where they differ, DeepSpeed's.

Both write the same header, and nothing in a file says who wrote it::

    code        1      2     3      4      5      6        7        8
    megatron    uint8  int8  int16  int32  int64  float64  float32  uint16
    deepspeed   uint8  int8  int16  int32  int64  uint16   uint32   uint64

The widths of 6 and of 8 differ, so the size of the ``.bin`` file tells them apart. Code 7 is four bytes either way:
small whole numbers read as float32 are all below 1e-36, which no measured float is, so they are refused until the
reader says what they are.
"""

from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from penstock._core.suggest import unknown_name

DtypeCodes = Literal["megatron", "deepspeed"]

_COMMON: Final = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8"}
CODES: Final[dict[DtypeCodes, dict[int, np.dtype[Any]]]] = {
    "megatron": {code: np.dtype(name) for code, name in {**_COMMON, 6: "<f8", 7: "<f4", 8: "<u2"}.items()},
    "deepspeed": {code: np.dtype(name) for code, name in {**_COMMON, 6: "<u2", 7: "<u4", 8: "<u8"}.items()},
}
"""The dtype of each code, by who writes it."""

_DOUBTFUL: Final = 7
_SMALL: Final = 1 << 26  # as float32 this is 1e-36
_PROBED: Final = 1 << 16


def check_dtype_codes(dtype_codes: str | None) -> None:
    """Refuse a name that is not one of the two."""
    if dtype_codes is not None and dtype_codes not in CODES:
        raise ValueError(unknown_name("kind of dtype codes", dtype_codes, CODES))


def dtype_code(dtype: npt.DTypeLike, dtype_codes: DtypeCodes = "megatron") -> int:
    """The format's code of a dtype.

    Raises:
        ValueError: The format has no code for it.
    """
    check_dtype_codes(dtype_codes)
    wanted = np.dtype(dtype).newbyteorder("<")
    for code, known in CODES[dtype_codes].items():
        if known == wanted:
            return code
    names = ", ".join(known.name for known in CODES[dtype_codes].values())
    other: DtypeCodes = "deepspeed" if dtype_codes == "megatron" else "megatron"
    hint = f"; dtype_codes={other!r} would hold it" if wanted in CODES[other].values() else ""
    raise ValueError(f"an indexed dataset cannot hold {np.dtype(dtype).name}; it holds {names}{hint}")


def doubts(
    code: int, lengths: npt.NDArray[np.int32], pointers: npt.NDArray[np.int64], data: npt.NDArray[np.uint8]
) -> str | None:
    """Why a file should not be read with Megatron's codes before its reader says so; None if there is no doubt.

    Args:
        code: The file's dtype code.
        lengths: Of the sequences, in tokens, unchecked.
        pointers: Where they start, in bytes, unchecked.
        data: The ``.bin`` file's bytes.
    """
    mine, other = CODES["megatron"][code], CODES["deepspeed"][code]
    if mine == other:
        return None
    remedy = f"open it with dtype_codes='deepspeed' ({other.name}) or dtype_codes='megatron' ({mine.name})"
    if code == _DOUBTFUL:
        probe = np.frombuffer(data[: data.size // 4 * 4], "<u4", min(data.size // 4, _PROBED))
        if probe.any() and int(probe.max()) < _SMALL:
            return (
                f"dtype code {code} is float32 in Megatron's files and uint32 in DeepSpeed's, and the numbers are too "
                f"small for floats; {remedy}"
            )
        return None
    filled = np.flatnonzero(lengths[-_PROBED:])
    if filled.size:
        last = max(0, len(lengths) - _PROBED) + int(filled[-1])
        start, length = int(pointers[last]), int(lengths[last])
        if start + length * other.itemsize == data.size != start + length * mine.itemsize:
            return f"dtype code {code}, and the sizes are those of a file by DeepSpeed; {remedy}"
    return None
