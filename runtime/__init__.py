"""The machine: plan, transports, one step, and the public `Runtime`."""

from .config import RuntimeConfig
from .cost.profile import FabricProfile, load_profile
from .cpu.step import Selection
from .errors import BlocksLostError, CoverageError, PeerError, SnapshotError
from .runtime import Runtime
from .scope import Request, Scope
from .service.server import Service
from .transport.base import LoopbackTransport

__all__ = [
    "BlocksLostError",
    "CoverageError",
    "FabricProfile",
    "LoopbackTransport",
    "PeerError",
    "Request",
    "Runtime",
    "RuntimeConfig",
    "Scope",
    "Selection",
    "Service",
    "SnapshotError",
    "load_profile",
]
