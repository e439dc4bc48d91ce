"""The kinds of links, and the family that each belongs to. Imports a family, and torch with it, only to make a link."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minidisagg.transfer.emulate import Nic
    from minidisagg.transfer.links import LinkSetup, ThreadLink

KINDS = ("cuda_ipc", "gloo", "nccl", "shm", "tcp", "unix")
ON_GPUS = ("cuda_ipc", "nccl")
ONE_SIDED = ("cuda_ipc", "shm")


# Seconds that each piece costs beside its bytes, both ends and the announcement together, and bytes per second after
# that. Measured between two pinned cores, nccl between two H100s on NVLink.
PIECE_COST = {
    "cuda_ipc": (0.2e-3, 300e9),
    "gloo": (0.6e-3, 1.2e9),
    "nccl": (0.3e-3, 250e9),
    "shm": (0.3e-3, 4.0e9),
    "tcp": (0.3e-3, 2.0e9),
    "unix": (0.3e-3, 2.5e9),
}


def resolve_kind(kind: str, *device_types: str) -> str:
    """The kind of link between caches on these device types ("cpu", "cuda"): `auto` is nccl between GPUs, else gloo.

    Raises `ValueError` for an unknown kind and for one that cannot reach these devices.
    """
    if kind == "auto":
        return "nccl" if device_types and all(device == "cuda" for device in device_types) else "gloo"
    if kind not in KINDS:
        raise ValueError(f"unknown link {kind!r}; known: auto, {', '.join(KINDS)}")
    wanted = "cuda" if kind in ON_GPUS else "cpu"
    if kind != "gloo" and any(device != wanted for device in device_types):
        raise ValueError(f"link {kind!r} needs caches on {wanted}, not {', '.join(device_types)}")
    return kind


def efficient_bytes(kind: str, nic: Nic | None) -> int:
    """What a piece must weigh to spend nine tenths of its time on its bytes."""
    fixed, rate = PIECE_COST[kind]
    return round(9 * fixed * (rate if nic is None else min(rate, nic.interconnect.bandwidth)))


def make_link(setup: LinkSetup) -> ThreadLink:
    """One end of a link of a resolved kind. The destination makes its end first and tells the source its `endpoint`.

    Raises `ValueError` for an unknown kind and for a cache that the kind cannot serve.
    """
    kind = resolve_kind(setup.host.kind, setup.host.kv.device.type)
    if kind == "gloo":
        from minidisagg.transfer.gloo import GlooLink

        return GlooLink(setup)
    if kind == "nccl":
        from minidisagg.transfer.nccl import NcclLink

        return NcclLink(setup)
    if kind == "cuda_ipc":
        from minidisagg.transfer.cuda_ipc import CudaIpcLink

        return CudaIpcLink(setup)
    if kind == "shm":
        from minidisagg.transfer.mapped import ShmLink

        return ShmLink(setup)
    from minidisagg.transfer.stream import StreamLink

    return StreamLink(setup)
