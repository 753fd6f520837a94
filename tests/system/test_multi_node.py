"""examples/multi_node_decode.py under two torchruns, each in a network namespace of its own.

The namespaces are joined by a veth pair alone, so whatever crosses nodes is seen by its counters. Where
namespaces are not permitted the test warns, and the two nodes are two loopback addresses.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = "examples/multi_node_decode.py"
SIZES = ("--files", "4", "--bytes-per-file", "256", "--tokens", "4", "--layers", "2")
VETH = "fabric0"
PATIENCE_S = 240.0

# Rank 1 gives its heads each other's output, so its tokens are no longer those of one process.
SPOILED = """
import os, runpy, sys
from qroam.runtime import Runtime
attend = Runtime.attend
if os.environ["RANK"] == "1":
    Runtime.attend = lambda *args, **options: attend(*args, **options).roll(1, dims=1)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as `python script` does
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class NotPermittedError(Exception):
    """This process may not make network namespaces; the text says what was refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Where one torchrun runs: its network namespace, or none; its interface and address."""

    namespace: str | None
    interface: str
    address: str

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *words] if self.namespace else [*words]

    def sent(self) -> int:
        """Bytes that its interface has sent."""
        (link,) = json.loads(ip("-n", str(self.namespace), "-j", "-s", "link", "show", VETH))
        return int(link["stats64"]["tx"]["bytes"])


class Ended(NamedTuple):
    code: int
    output: str


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


@contextmanager
def two_namespaces() -> Iterator[tuple[Node, Node]]:
    """Two nodes that reach each other over a veth pair and nothing else.

    Raises: NotPermittedError.
    """
    if shutil.which("ip") is None:
        raise NotPermittedError("there is no `ip`")
    nodes = tuple(
        Node(namespace=f"qroam-{os.getpid()}-{n}", interface=VETH, address=f"198.51.100.{n + 1}")
        for n in range(2)
    )
    first, second = (str(node.namespace) for node in nodes)
    make_pair = ["ip", "-n", first, "link", "add", VETH, "type", "veth", "peer", "name", VETH]
    with ExitStack() as made:
        for command in (
            ["ip", "netns", "add", first],
            ["ip", "netns", "add", second],
            [*make_pair, "netns", second],
            ["ip", "netns", "exec", first, "true"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotPermittedError(f"{' '.join(command)}: {done.stderr.strip()}")
            if command[1:3] == ["netns", "add"]:
                made.callback(ip, "netns", "del", command[-1])
        for node in nodes:
            inside = ("-n", str(node.namespace))
            ip(*inside, "link", "set", VETH, "addrgenmode", "none")  # no IPv6 address
            ip(*inside, "address", "add", f"{node.address}/30", "dev", VETH)
            for link in ("lo", VETH):  # ranks of one node talk over lo, whatever their address
                ip(*inside, "link", "set", link, "up")
        yield nodes[0], nodes[1]


def two_addresses() -> tuple[Node, Node]:
    """Two nodes on this machine: the agents' addresses differ; gloo's are the interface's own."""
    return (
        Node(namespace=None, interface="lo", address="127.0.0.1"),
        Node(namespace=None, interface="lo", address="127.0.0.2"),
    )


def run_nodes(nodes: tuple[Node, Node], folder: Path, *script: str, ranks: int) -> list[Ended]:
    """The script under a torchrun of so many ranks on each node; how each ended."""
    with socket.socket() as probe:  # free on this machine; in a new namespace all are
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    started: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"node-{n}.log" for n in range(len(nodes))]
    expiry = time.monotonic() + PATIENCE_S
    try:
        for n, (node, log) in enumerate(zip(nodes, logs, strict=True)):
            torchrun = f"{sysconfig.get_path('scripts')}/torchrun"
            shape = ("--nnodes", "2", "--nproc-per-node", str(ranks), "--rdzv-id", f"qroam-{port}")
            meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{nodes[0].address}:{port}")
            # Both nodes have this machine's name, which leads to neither.
            here = ("--local-addr", node.address, "--rdzv-conf", f"is_host={int(n == 0)}")
            with log.open("wb") as output:
                process = subprocess.Popen(
                    node.command(torchrun, *shape, *meet, *here, *script),
                    cwd=ROOT,
                    env=os.environ | {"GLOO_SOCKET_IFNAME": node.interface, "OMP_NUM_THREADS": "1"},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            started.append(process)
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(expiry - time.monotonic(), 0.0))
    finally:
        codes = [end(process) for process in started]
    return [Ended(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def end(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a torchrun, which is ended with its ranks if it still runs."""
    if process.poll() is None:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()  # it then ends its ranks
        with suppress(subprocess.TimeoutExpired):
            process.wait(10.0)
        for rank in [*map(int, ranks)] if process.poll() is None else []:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        process.kill()
    return process.wait()


def counted(text: str, pattern: str) -> list[tuple[int, ...]]:
    """The numbers of every match."""
    return [
        tuple(int(number.replace(",", "")) for number in match)
        for match in re.findall(pattern, text)
    ]


@pytest.mark.slow
@pytest.mark.processes
def test_two_nodes_decode_what_one_process_does(tmp_path: Path) -> None:
    with ExitStack() as cleanup:
        try:
            nodes = cleanup.enter_context(two_namespaces())
        except NotPermittedError as refused:
            warnings.warn(
                f"two loopback addresses, for want of namespaces: {refused}", stacklevel=1
            )
            nodes = two_addresses()
        ended = run_nodes(nodes, tmp_path, EXAMPLE, *SIZES, ranks=2)
        carried = sum(node.sent() for node in nodes) if nodes[0].namespace else None
    text = "\n".join(output for _, output in ended)
    assert [code for code, _ in ended] == [0, 0], text
    assert "corpus     1,024 tokens of 4 files, over 4 ranks of 2 nodes\n" in text
    assert text.count("result     equal\n") == 1
    assert text.count("; 4 of 4 tokens equal") == 4

    ranks = re.findall(r"rank (\d)     node (\d), (\S+) (\S+): ", text)
    assert [int(rank) for rank, *_ in ranks] == [0, 1, 2, 3]
    assert len({(node, interface, address) for _, node, interface, address in ranks}) == 2
    sent = counted(text, r"sent ([\d,]+) bytes inside its node, ([\d,]+) across")
    ((inside, across),) = counted(text, r"bytes      ([\d,]+) inside nodes, ([\d,]+) across")
    assert (inside, across) == tuple(sum(column) for column in zip(*sent, strict=True))
    assert inside > 0
    if carried is None:
        assert {(interface, address) for *_, interface, address in ranks} == {("lo", "127.0.0.1")}
        return
    used = {node: (interface, address) for _, node, interface, address in ranks}
    assert sorted(used.values()) == [(VETH, node.address) for node in nodes]
    # What the example counts is what crossed: little else did (frames, TCP's headers, rendezvous).
    assert across < carried < 1.15 * across


@pytest.mark.slow
@pytest.mark.processes
def test_a_rank_that_differs_fails_every_node(tmp_path: Path) -> None:
    """On two loopback addresses, which is also what runs where namespaces are not permitted."""
    spoiled = tmp_path / "spoiled.py"
    spoiled.write_text(SPOILED)
    small = ("--files", "2", "--bytes-per-file", "256", "--tokens", "3", "--layers", "1")
    ended = run_nodes(two_addresses(), tmp_path, str(spoiled), EXAMPLE, *small, ranks=1)
    text = "\n".join(output for _, output in ended)
    assert [code for code, _ in ended] == [1, 1], text
    assert "result     DIFFERS from one process\n" in text
    (_, (rank, equal)) = counted(text, r"rank (\d) .*?; (\d+) of 3 tokens equal")
    assert rank == 1
    assert equal < 3
