"""Hosts of a network on one machine, each with a network interface, a name and files in memory of its own.

::

    these tests ── jb… ──┐          ┌── eth0 ── far[0]
                         ├─ switch ─┼── eth0 ── far[1], ...
    near ────── eth0 ────┘          └── eth0 ── head

A host is a process that does nothing: what it holds are its namespaces, and workers are born into them. ``near`` has
all but the network in common with the tests, so that what comes over the network to the client's own host can be
counted apart. The switch is a host with a bridge.

Nothing here outlives the tests, killed ones too: hosts end with the nursery, and namespaces and links, which have no
name elsewhere, with the last process in them.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import NamedTuple

from clusters import LONG, ROOT, Place, bind, hide, is_alive, kill, system, wait_until

#: unshare(2).
_CLONE_NEWUTS, _CLONE_NEWNET = 0x4000000, 0x40000000

#: Folders that each host has for itself, in memory.
OWN_FOLDERS = sorted({"/dev/shm", tempfile.gettempdir()})


class Limit(NamedTuple):
    """What a link can be made: in words for people, and for ``tc qdisc``."""

    meaning: str
    words: tuple[str, ...]


#: Best first.
_LIMITS = (
    Limit("1 Gbit/s, 0.5 ms", ("netem", "delay", "500us", "rate", "1gbit", "limit", "20000")),
    Limit("1 Gbit/s, no latency (tc has no netem here)", ("tbf", "rate", "1gbit", "burst", "1mb", "limit", "4mb")),
)


class HostsUnavailableError(Exception):
    """This machine does not let these tests make hosts."""


class Traffic(NamedTuple):
    """Bytes on an interface since it was made."""

    received: int
    sent: int

    def __sub__(self, other):
        return Traffic(self.received - other.received, self.sent - other.sent)


class Link(NamedTuple):
    """The cable between an interface and the switch."""

    #: The process in whose network the interface is, and its name there.
    owner: int | str
    interface: str
    switch: int
    port: str

    def traffic(self):
        return traffic_of(self.owner)[self.interface]

    def cut(self):
        _ip(self.switch, f"link set {self.port} down")

    def mend(self):
        _ip(self.switch, f"link set {self.port} up")


class Census(NamedTuple):
    """Where the memory of a host is, in bytes."""

    #: In files in memory, whoever maps them.
    files: int
    #: Of files in memory in each worker, and in all of them when shared pages count once.
    mapped: list[int]
    mapped_once: int
    #: In no file, for each worker.
    own: list[int]


class Host:
    """A host of the network.

    Parameters
    ----------
    name : str
        Its host name.
    address : str
        Its address.
    holder : psutil.Process
        What holds its namespaces.
    link : Link
        Its only one.
    has_own_files : bool
        Whether it has files in memory of its own; ``near`` has the tests'.
    """

    def __init__(self, name, address, holder, link, *, has_own_files=True):
        self.name = name
        self.link = link
        self._has_own_files = has_own_files
        self.place = Place(address, holder.pid, Path(tempfile.gettempdir()) if has_own_files else None)

    def __repr__(self):
        return f"<Host {self.name}>"

    def files(self):
        """Return the sizes of the files in its memory, by path."""
        assert self._has_own_files, "these are everybody's files"
        found = {}
        for root in self._roots():
            # What the host sees of other file systems is not its own.
            its_device = root.stat().st_dev
            for folder, inner, names in os.walk(root):
                inner[:] = [name for name in inner if os.lstat(os.path.join(folder, name)).st_dev == its_device]
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        path = Path(folder, name)
                        found["/" / path.relative_to(self._root)] = path.lstat().st_size
        return found

    def census(self, workers):
        """Return where its memory is, as far as its workers hold it."""
        figures = [_memory_of(worker.pid) for worker in workers]
        return Census(
            sum(self._occupied(root) for root in self._roots()) if self._has_own_files else 0,
            [mapped for mapped, _, _ in figures],
            sum(once for _, once, _ in figures),
            [own for _, _, own in figures],
        )

    @property
    def _root(self):
        return Path(f"/proc/{self.place.holder}/root")

    def _roots(self):
        return [self._root / folder.lstrip("/") for folder in OWN_FOLDERS]

    @staticmethod
    def _occupied(root):
        # Not the sizes of the files: those that are mapped and have no name any more count, too.
        figures = os.statvfs(root)
        return (figures.f_blocks - figures.f_bfree) * figures.f_frsize


class Hosts:
    """A network of hosts.

    Parameters
    ----------
    nursery : Nursery
        Where their processes come from.
    shared_folder : path
        What all hosts see, as if it were on a file server.
    n_far : int
        Hosts that have nothing in common with the tests' own, beside ``head``.

    Raises
    ------
    HostsUnavailableError
        If this machine does not allow it.
    """

    def __init__(self, nursery, shared_folder, n_far):
        self._nursery = nursery
        self._shared_folder = Path(shared_folder)
        self._folder = self._shared_folder / f"hosts-{uuid.uuid4().hex[:8]}"
        self._folder.mkdir()
        self._holders = []
        self._subnet = _free_subnet()
        self._limits = list(_LIMITS)
        try:
            self._switch = self._hold("switch").pid
            _ip(self._switch, "link add switch type bridge", "link set switch up")
            self.client_link = self._plug("self", f"jb{uuid.uuid4().hex[:10]}", "client", f"{self._subnet}.1")
            self.near = self._make_host("near", 2, has_own_files=False)
            self.head = self._make_host("head", 3)
            self.far = [self._make_host(f"far{i}", 4 + i) for i in range(n_far)]
        except BaseException:
            self.close()
            raise

    def close(self):
        """End all hosts; workers on them must have ended."""
        for holder in self._holders:
            kill(holder)
        # It goes by itself with the switch, in the kernel's own time.
        if hasattr(self, "client_link"):
            subprocess.run(["ip", "link", "del", self.client_link.interface], capture_output=True, timeout=LONG)

    @property
    def links(self):
        """What the links are like, in words."""
        return self._limits[0].meaning if self._limits else "as fast as this machine (no tc, or it limits nothing)"

    @property
    def all(self):
        """The hosts that can have workers."""
        return [self.near, *self.far]

    def _make_host(self, name, number, *, has_own_files=True):
        holder = self._hold(name, has_own_files=has_own_files)
        address = f"{self._subnet}.{number}"
        _ip(holder.pid, "link set lo up")
        link = self._plug(holder.pid, "eth0", name, address)
        return Host(name, address, holder, link, has_own_files=has_own_files)

    def _hold(self, name, *, has_own_files=False):
        ready, log = self._folder / name, self._folder / f"{name}.log"
        # The code may be in a folder that hosts have for themselves.
        files = [name, self._shared_folder, ROOT, sys.prefix, sys.base_prefix] if has_own_files else []
        holder = self._nursery.fork("host", ready, *files, log=log)
        self._holders.append(holder)
        wait_until(lambda: ready.exists() or not is_alive(holder))
        if not ready.exists():
            why = log.read_text().splitlines()[-1:] or ["its process has ended"]
            raise HostsUnavailableError(f"no host can be made here: {why[0]}")
        return holder

    def _plug(self, owner, interface, port, address):
        """Connect a network with the switch."""
        _ip("self", f"link add {port} netns {self._switch} type veth peer name {interface} netns {_pid(owner)}")
        _ip(self._switch, f"link set {port} master switch up")
        _ip(owner, f"addr add {address}/24 dev {interface}", f"link set {interface} up")
        self._slow_down(owner, interface)
        return Link(owner, interface, self._switch, port)

    def _slow_down(self, owner, interface):
        """Limit what an interface sends, as well as this machine can."""
        while self._limits:
            with contextlib.suppress(HostsUnavailableError):
                _run(_inside(owner, "tc", "qdisc", "replace", "dev", interface, "root", *self._limits[0].words))
                return
            del self._limits[0]


def hold(arguments):
    """Be a host: take namespaces, say so with a file, wait for the end. Runs in a process of the nursery."""
    ready, *files = arguments
    system("unshare", _CLONE_NEWNET | _CLONE_NEWUTS)
    if files:
        name, *seen = files
        socket.sethostname(name)
        hide(*OWN_FOLDERS, size="512m", seen=seen)
        # Hosts are told apart by it, too.
        boot_id = Path(f"{ready}.boot_id")
        boot_id.write_text(f"{uuid.uuid4()}\n")
        bind(boot_id, "/proc/sys/kernel/random/boot_id")
    Path(ready).touch()
    while True:
        signal.pause()


def traffic_of(pid):
    """Return what went over each interface of a process' network, by name."""
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    fields = {line.partition(":")[0].strip(): line.partition(":")[2].split() for line in lines}
    return {interface: Traffic(int(counts[0]), int(counts[8])) for interface, counts in fields.items()}


@contextlib.contextmanager
def counting(hosts):
    """Return a dictionary that has the traffic of the block at its end, by the name of the host, or "client"."""
    links = {host.name: host.link for host in [*hosts.all, hosts.head]} | {"client": hosts.client_link}
    before = {name: link.traffic() for name, link in links.items()}
    found = {}
    yield found
    found |= {name: link.traffic() - before[name] for name, link in links.items()}


def _memory_of(pid):
    """Return bytes of a process: mapped from files in memory, the same when shared pages count once, and in no file."""
    mapped = once = own = 0
    is_file_in_memory = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if heading := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)", line):
            is_file_in_memory = heading[1].startswith(tuple(f"{folder}/" for folder in OWN_FOLDERS))
            continue
        field, _, rest = line.partition(":")
        if field == "Anonymous":
            own += _bytes(rest)
        elif is_file_in_memory and field == "Rss":
            mapped += _bytes(rest)
        elif is_file_in_memory and field == "Pss":
            once += _bytes(rest)
    return mapped, once, own


def _bytes(text):
    return int(text.split()[0]) * 1024


# ---- the network


def _pid(owner):
    return os.getpid() if owner == "self" else owner


def _inside(owner, *words):
    """Return a command that runs in the network of a process."""
    return ["nsenter", f"--net=/proc/{_pid(owner)}/ns/net", *words]


def _ip(owner, *lines):
    """Run lines of ``ip`` in the network of a process."""
    _run(_inside(owner, "ip", "-batch", "-"), "".join(f"{line}\n" for line in lines))


def _run(command, text=""):
    try:
        return subprocess.run(command, input=text, check=True, capture_output=True, text=True, timeout=LONG).stdout
    except FileNotFoundError as error:
        raise HostsUnavailableError(f"no network of hosts can be made here: there is no {command[0]}") from error
    except subprocess.CalledProcessError as error:
        why = (error.stderr or error.stdout).strip().replace("\n", "; ")
        raise HostsUnavailableError(f"no network of hosts can be made here: {' '.join(command)}: {why}") from error


def _free_subnet():
    """Return the first three numbers of addresses that nobody here has."""
    taken = _run(["ip", "-4", "-o", "addr"]) + _run(["ip", "-4", "route"])
    third = os.getpid() % 256
    while (subnet := f"10.213.{third}") + "." in taken:
        third = (third + 1) % 256
    return subnet
