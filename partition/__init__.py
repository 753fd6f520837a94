"""What is stored and where: layouts, codecs, placement, directory, pool."""

from .codec import CODEC_NAMES, Codec, make_codec
from .directory import Document
from .layout import (
    LAYOUT_NAMES,
    Form,
    IndexLayout,
    Layout,
    ModelLayout,
    mla,
    mlra,
    named_layout,
    uniform_model,
    with_codec,
)
from .placement import POLICIES, Placement

__all__ = [
    "CODEC_NAMES",
    "LAYOUT_NAMES",
    "POLICIES",
    "Codec",
    "Document",
    "Form",
    "IndexLayout",
    "Layout",
    "ModelLayout",
    "Placement",
    "make_codec",
    "mla",
    "mlra",
    "named_layout",
    "uniform_model",
    "with_codec",
]
