"""A number with its word, for messages."""


def counted(number: int, one: str, many: str) -> str:
    """``"1 process"`` or ``"4 processes"``."""
    return f"{number} {one if number == 1 else many}"
