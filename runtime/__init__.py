"""The machine: plan, transports, one step, and the public `Runtime`."""

from .config import RuntimeConfig
from .cost.profile import FabricProfile, load_profile
from .errors import BlocksLostError, CoverageError, PeerError, SnapshotError
from .requests import Request, Scope
from .runtime import Runtime
from .service import Service
from .step import Selection
from .transport import LoopbackTransport

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
