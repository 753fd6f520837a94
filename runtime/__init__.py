"""The machine: plan, transports, one step, and the public `Runtime`. What a user needs is named here."""

from .config import RuntimeConfig
from .corpus.restore import RestoreReport
from .corpus.snapshot import SnapshotReport
from .corpus.verify import BlockCheck
from .cost.profile import FabricProfile, load_profile
from .errors import BlocksLostError, CoverageError, PeerError, SnapshotError
from .observe.explain import DecisionLine
from .runtime import Runtime
from .scope import Request, Scope, Selection
from .service.server import Service
from .transport.base import Transport
from .transport.loopback import LoopbackTransport

__all__ = [
    "BlockCheck",
    "BlocksLostError",
    "CoverageError",
    "DecisionLine",
    "FabricProfile",
    "LoopbackTransport",
    "PeerError",
    "Request",
    "RestoreReport",
    "Runtime",
    "RuntimeConfig",
    "Scope",
    "Selection",
    "Service",
    "SnapshotError",
    "SnapshotReport",
    "Transport",
    "load_profile",
]
