"""How two ranks come to trust a connection: both prove to know a secret, and neither sends it.

::

    caller                                    listener
      | -- who calls, a number drawn by lot --> |
      | <-- another number, proof ------------- |
      | -- proof -----------------------------> |

A proof is a keyed digest of all that was said before. The caller may give up at any time before the last line: a
listener that is slow to answer then finds nobody there, and not two connections of one caller.
"""

import hmac
import secrets
import socket
import struct
import time
from typing import Final, NamedTuple

TOKEN_BYTES: Final = 32
CALL_S: Final = 5.0
"""How long a caller waits at one address."""
ANSWER_S: Final = 60.0
"""How long a listener waits for the rest of a greeting; callers that wait no longer call again."""
_MAGIC: Final = b"PSTC"
_HELLO: Final = struct.Struct("<4sIc16s")
_NUMBER_BYTES: Final = 16
_PROOF_BYTES: Final = 32


class Caller(NamedTuple):
    """Who calls.

    Attributes:
        rank: In the world.
        direction: What the connection is for, one letter.
    """

    rank: int
    direction: str


def call(address: str, port: int, token: bytes, caller: Caller) -> socket.socket:
    """Connect to a listener.

    Args:
        address: Where it may be.
        port: Its port.
        token: The listener's secret.
        caller: Who calls.

    Raises:
        TimeoutError: Nobody answers there in time.
        OSError: Nobody answers there, or somebody else does.
    """
    until = time.monotonic() + CALL_S
    connection = socket.create_connection((address, port), timeout=CALL_S)
    try:
        hello = _HELLO.pack(_MAGIC, caller.rank, caller.direction.encode(), secrets.token_bytes(_NUMBER_BYTES))
        connection.sendall(hello)
        number = _exactly(connection, _NUMBER_BYTES, until)
        if not hmac.compare_digest(
            _exactly(connection, _PROOF_BYTES, until), _proof(token, b"listener", hello + number)
        ):
            raise ConnectionRefusedError(f"another program listens at {address}")
        connection.sendall(_proof(token, b"caller", hello + number))
    except OSError:
        connection.close()
        raise
    return connection


def answer(connection: socket.socket, token: bytes) -> Caller | None:
    """Hear who calls; None for whoever hangs up, takes too long or does not know the secret."""
    until = time.monotonic() + ANSWER_S
    try:
        hello = _exactly(connection, _HELLO.size, until)
        magic, rank, direction, _ = _HELLO.unpack(hello)
        if magic != _MAGIC:
            return None
        number = secrets.token_bytes(_NUMBER_BYTES)
        connection.sendall(number + _proof(token, b"listener", hello + number))
        if not hmac.compare_digest(_exactly(connection, _PROOF_BYTES, until), _proof(token, b"caller", hello + number)):
            return None
    except OSError:
        return None
    return Caller(rank, direction.decode("ascii", "replace"))


def _proof(token: bytes, side: bytes, said: bytes) -> bytes:
    return hmac.digest(token, side + said, "sha256")


def _exactly(connection: socket.socket, nbytes: int, until: float) -> bytes:
    got = b""
    while len(got) < nbytes:
        connection.settimeout(max(1e-3, until - time.monotonic()))
        piece = connection.recv(nbytes - len(got))
        if not piece:
            raise ConnectionResetError("closed during the greeting")
        got += piece
    return got
