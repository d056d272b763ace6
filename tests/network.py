"""Hosts on one machine: network namespaces, each with an interface of its own, joined by a switch in another."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_NAMESPACES = Path("/var/run/netns")


class Network:
    """Hosts 0 .. ``num_hosts - 1``, at 10.83.0.1 and up."""

    def __init__(self, num_hosts: int) -> None:
        self._mark = f"tf{os.getpid()}n{num_hosts}"
        self.hosts = [f"{self._mark}h{host}" for host in range(num_hosts)]
        self._switch = f"{self._mark}s"

    def build(self) -> None:
        """Make everything; needs the right to.

        Raises:
            RuntimeError: it cannot be made; says why.
        """
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for number, host in enumerate(self.hosts):
            _ip("netns", "add", host)
            _ip("-n", host, "link", "add", "eth0", "type", "veth", "peer", f"port{number}", "netns", self._switch)
            _ip("-n", self._switch, "link", "set", f"port{number}", "master", "bridge", "up")
            _ip("-n", host, "address", "add", f"10.83.0.{number + 1}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")
            _ip("-n", host, "link", "set", "lo", "up")

    def cut(self, host: int) -> None:
        """Let no packet reach the host or leave it."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "down")

    def restore(self, host: int) -> None:
        """Undo :meth:`cut`."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "up")

    def remove(self) -> None:
        """Let go of everything that was made."""
        for name in (*self.hosts, self._switch):
            with suppress(RuntimeError):
                _ip("netns", "delete", name)


def enter(host: str) -> None:
    """Make this thread, and what it starts, live on the host."""
    file = os.open(_NAMESPACES / host, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(file, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {host}")
    finally:
        os.close(file)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"


@contextmanager
def network_of(num_hosts: int) -> Iterator[Network]:
    """A network that goes in the end.

    Raises:
        RuntimeError: it cannot be made; says why.
    """
    network = Network(num_hosts)
    try:
        network.build()
        yield network
    finally:
        network.remove()


def _ip(*arguments: str) -> None:
    program = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise RuntimeError("no program ip (package iproute2)")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
