"""Two hosts on one machine: network namespaces, and between them a link as slow as one wants it. Needs root.

The ends of the link are TUN devices. The kernel limits the rate (`tc`, token bucket filter); a relay between the two
holds every packet back for the delay, since not every kernel has `netem`.
"""

import fcntl
import os
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

DEVICE = "pod-link"
_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001
_MTU = 9000  # large packets: the relay shares its two cores with the training


@dataclass(frozen=True)
class Shape:
    """What the link lets through, in each direction."""

    megabits: float
    """Per second."""
    milliseconds: float
    """From one end to the other."""


class Relay(threading.Thread):
    """Carries packets from each of two TUN devices to the other, `delay` seconds later."""

    def __init__(self, ends: tuple[int, int]) -> None:
        super().__init__(daemon=True)
        self.delay = 0.0
        self._other = dict(zip(ends, reversed(ends), strict=True))
        self._stopping = False

    def run(self) -> None:
        """Run until `stop`."""
        waiting: deque[tuple[float, int, bytes]] = deque()  # the delay is one for all: first come, first served
        poll = select.epoll()
        for end in self._other:
            poll.register(end, select.EPOLLIN)
        while not self._stopping:
            timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.1
            for end, _ in poll.poll(timeout):
                waiting.append((time.monotonic() + self.delay, self._other[end], os.read(end, 1 << 16)))
            while waiting and waiting[0][0] <= time.monotonic():
                _, end, packet = waiting.popleft()
                os.write(end, packet)

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        self.join()


class TwoHosts:
    """Hosts 0 and 1, at `addresses`, whose only way to each other is DEVICE."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self, namespaces: tuple[str, str], relay: Relay) -> None:
        self._namespaces = namespaces
        self._relay = relay

    def on(self, host: int, *words: object) -> list[str]:
        """Return the command that runs `words` on a host."""
        return ["ip", "netns", "exec", self._namespaces[host], *map(str, words)]

    def shape(self, shape: Shape | None) -> None:
        """Make the link slow, or as fast as it can be."""
        self._relay.delay = shape.milliseconds / 1e3 if shape else 0.0
        for host in (0, 1):
            subprocess.run(self.on(host, "tc", "qdisc", "del", "dev", DEVICE, "root"), stderr=subprocess.DEVNULL)
            if shape:
                limit = ("rate", f"{shape.megabits}mbit", "burst", "64kb", "latency", "500ms")
                _run(*self.on(host, "tc", "qdisc", "add", "dev", DEVICE, "root", "tbf", *limit))


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Make the hosts; they are gone after the `with` block, whatever happened in it.

    Raises:
        PermissionError: not root.
        RuntimeError: a program that failed, with what it said.
    """
    if os.geteuid() != 0:
        raise PermissionError("network namespaces need root")
    names = (f"twa-{os.getpid()}-0", f"twa-{os.getpid()}-1")
    with ExitStack() as undo:
        ends = []
        for host, name in enumerate(names):
            _run("ip", "netns", "add", name)
            undo.callback(_run, "ip", "netns", "del", name)
            end = os.open("/dev/net/tun", os.O_RDWR)
            undo.callback(os.close, end)
            fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", f"twa{os.getpid()}-{host}".encode(), _IFF_TUN_NO_PI))
            _run("ip", "link", "set", f"twa{os.getpid()}-{host}", "netns", name, "name", DEVICE, "mtu", _MTU)
            _run("ip", "-n", name, "addr", "add", f"{TwoHosts.addresses[host]}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", "dev", DEVICE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            ends.append(end)
        relay = Relay((ends[0], ends[1]))
        relay.start()
        undo.callback(relay.stop)
        yield TwoHosts(names, relay)


def _run(*words: object) -> None:
    command = list(map(str, words))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
