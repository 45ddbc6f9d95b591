"""Where other ranks reach this machine."""

import os
import socket
import struct
import sys
from pathlib import Path
from typing import Final

_INTERFACE: Final = "GLOO_SOCKET_IFNAME"
"""The variable by which users choose the interface of torch's CPU collectives; messages take the same."""
_SIOCGIFADDR: Final = 0x8915
_ANY_PORT: Final = 9
LOOPBACK: Final = "127.0.0.1"


def chosen_address() -> str | None:
    """The IPv4 address of the interface in ``GLOO_SOCKET_IFNAME``, None where that is not set (or not on Linux).

    Raises:
        ValueError: There is no such interface, or it has no address.
    """
    name = os.environ.get(_INTERFACE, "").split(",")[0].strip()
    if not name or sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            packed = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            known = ", ".join(interface for _, interface in socket.if_nameindex())
            raise ValueError(
                f"{_INTERFACE}={name!r} names no interface with an IPv4 address ({error.strerror}); "
                f"this machine has {known}"
            ) from None
    return socket.inet_ntoa(packed[20:24])


def own_addresses() -> list[str]:
    """Addresses by which others may reach this machine: towards ``MASTER_ADDR``, by its name, loopback."""
    found = [LOOPBACK]
    try:
        by_name = [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    except OSError:  # a name that no one can resolve, as containers have
        by_name = []
    found = [*(str(address) for address in by_name), *found]
    master = os.environ.get("MASTER_ADDR")
    if master:
        towards = _address_towards(master)
        if towards is not None:
            found = [towards, *found]
    return list(dict.fromkeys(found))


def machine() -> str:
    """Tells machines, and network namespaces of one machine, apart."""
    parts = [socket.gethostname()]
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    if boot.exists():
        parts.append(boot.read_text().strip())
    if namespace.exists():
        parts.append(str(namespace.stat().st_ino))
    return "/".join(parts)


def _address_towards(host: str) -> str | None:
    """This machine's address on the way to another; nothing is sent to find out."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as any_socket:
            any_socket.connect(target)
            return str(any_socket.getsockname()[0])
    except OSError:
        return None
