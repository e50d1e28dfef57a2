"""Packet filters in the language of tcpdump, such as ``tcp port 80 and host 10.0.0.1``.

libpcap of this machine compiles them (``apt install libpcap0.8`` where it is missing); what comes out is checked and
run by virtnet itself.
"""

from __future__ import annotations

import ctypes
import functools

from virtnet.errors import ConfigError

__all__ = ["compile_filter"]

#: The link type of Ethernet, and as much of a frame as there can be.
DLT_EN10MB = 1
SNAP_LENGTH = 65535
NETMASK_UNKNOWN = 0xFFFFFFFF


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.POINTER(_Instruction)))


def compile_filter(text: str) -> list[tuple[int, int, int, int]]:
    """Compiles a filter for Ethernet frames; nothing is the filter that matches everything.

    Returns:
        Instructions of the classic Berkeley Packet Filter: code, two jumps, number.

    Raises:
        ConfigError: the text is no filter, or there is no libpcap.

    Example:
        >>> compile_filter("")
        []
    """
    if not text.strip():
        return []
    library = _libpcap()
    handle = library.pcap_open_dead(DLT_EN10MB, SNAP_LENGTH)
    program = _Program()
    try:
        if library.pcap_compile(handle, ctypes.byref(program), text.encode(), 1, NETMASK_UNKNOWN):
            why = library.pcap_geterr(handle).decode(errors="replace")
            raise ConfigError(f"{text!r} is no packet filter: {why}")
        found = [program.instructions[i] for i in range(program.length)]
        compiled = [(one.code, one.jt, one.jf, one.k) for one in found]
        library.pcap_freecode(ctypes.byref(program))
    finally:
        library.pcap_close(handle)
    return compiled


@functools.cache
def _libpcap() -> ctypes.CDLL:
    from ctypes.util import find_library

    name = find_library("pcap")
    if name is None:
        raise ConfigError(
            "packet filters are compiled by libpcap, which was not found: install it (Debian: apt install libpcap0.8)"
        )
    library = ctypes.CDLL(name)
    library.pcap_open_dead.restype = ctypes.c_void_p
    library.pcap_open_dead.argtypes = [ctypes.c_int, ctypes.c_int]
    library.pcap_compile.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(_Program),
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_uint,
    ]
    library.pcap_geterr.restype = ctypes.c_char_p
    library.pcap_geterr.argtypes = [ctypes.c_void_p]
    library.pcap_freecode.argtypes = [ctypes.POINTER(_Program)]
    library.pcap_close.argtypes = [ctypes.c_void_p]
    return library
