"""What is stored and where: layouts of a model's layers, placement of documents, codecs, the block pool.

What a user needs is named here; inside the package everything is imported from its module.
"""

from .codec import CODEC_NAMES, Codec, make_codec
from .directory import Document
from .layout import (
    Branch,
    Form,
    IndexLayout,
    Layout,
    ModelLayout,
    Pairing,
    Projection,
    Rope,
    Stream,
    Yarn,
)
from .placement import PLACEMENT_POLICIES, Placement
from .presets import LAYOUT_NAMES, mla, mlra, named_layout, uniform_model, with_codec
from .rope import apply_rope, deinterleave, rope_tables

__all__ = [
    "CODEC_NAMES",
    "LAYOUT_NAMES",
    "PLACEMENT_POLICIES",
    "Branch",
    "Codec",
    "Document",
    "Form",
    "IndexLayout",
    "Layout",
    "ModelLayout",
    "Pairing",
    "Placement",
    "Projection",
    "Rope",
    "Stream",
    "Yarn",
    "apply_rope",
    "deinterleave",
    "make_codec",
    "mla",
    "mlra",
    "named_layout",
    "rope_tables",
    "uniform_model",
    "with_codec",
]
