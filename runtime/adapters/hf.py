"""Hugging Face transformers: DeepSeek-V3.2 and GLM-5 models that attend through a `Runtime`.

In transformers the cache update, the expansion of latents to per-head keys and values, and the
indexer all run before the attention function, so the function alone is not enough. `HFEngine`
changes, on the attention modules of one model instance:

    past_key_values   a cache of the requests' private tokens, whose rows live in the runtime's pool
    expand_kv         nothing: no row is ever expanded
    indexer           the model's own projections, then `Runtime.select`
    attention         `Runtime.attend`, registered as the implementation "qroam"

Letters: B requests of a batch, S new tokens of each, T = B * S queries, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ...indexer import head_weights, index_key, index_query
from ...partition.layout import IndexLayout, Layout, ModelLayout, Pairing, Yarn
from ...partition.presets import mla
from ..runtime import Runtime
from ..scope import Request, Scope, Selection

MODEL_TYPES = ("deepseek_v32", "glm_moe_dsa")
IMPLEMENTATION = "qroam"

# Sees each selection before it is used, and may return another one.
Review = Callable[[int, "Batch", Selection], Selection]
# Sees each attention step: layer, query (T, H, D), selection, output (T, H, V).
Observe = Callable[[int, Tensor, Selection, Tensor], None]


def model_layout(config: Any, *, codec: str = "fp32", index_codec: str = "fp32") -> ModelLayout:
    """The layouts of a `DeepseekV32Config` or `GlmMoeDsaConfig`.

    Raises: ValueError for another model type or rope type, or a first layer without an indexer.
    """
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"model type {config.model_type!r} is not one of {MODEL_TYPES}")
    pairing: Pairing = "half" if config.model_type == "deepseek_v32" else "interleaved"
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5 * _yarn_scale(config)
    index = IndexLayout(
        heads=config.index_n_heads,
        head_dim=config.index_head_dim,
        rope_dim=config.qk_rope_head_dim,
        pairing=pairing,
        top_k=config.index_topk,
    )
    rope: dict[str, Any] = config.rope_parameters
    types = getattr(config, "indexer_types", None) or ["full"] * config.num_hidden_layers
    if types[0] != "full":
        raise ValueError(f"the first layer must have an indexer, indexer_types are {types}")
    layers: list[Layout] = []
    sources: list[int] = []
    for layer, kind in enumerate(types):
        sources.append(layer if kind == "full" else sources[-1])
        layers.append(
            mla(
                name=f"{config.model_type} layer {layer}",
                heads=config.num_attention_heads,
                latent=config.kv_lora_rank,
                rope=config.qk_rope_head_dim,
                nope=config.qk_nope_head_dim,
                value=config.v_head_dim,
                softmax_scale=scale,
                codec=codec,
                index=index if kind == "full" else None,
                index_codec=index_codec,
                # transformers puts interleaved pairs apart as it rotates them.
                pairing="half",
                theta=float(rope["rope_theta"]),
                yarn=_yarn(config),
            )
        )
    return ModelLayout(layers=tuple(layers), index_source=tuple(sources))


def _yarn(config: Any) -> Yarn | None:
    """The scaling of the model's rotary frequencies; ValueError if it is neither none nor YaRN's."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope type {kind!r} is not one of default, yarn")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return Yarn(
        factor=float(rope["factor"]),
        original_positions=int(original),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
    )


def _yarn_scale(config: Any) -> float:
    """What YaRN's `mscale_all_dim` does to the softmax scale."""
    rope = config.rope_parameters
    mscale = rope.get("mscale_all_dim", 0) if rope.get("rope_type", "default") != "default" else 0
    if not mscale or rope["factor"] <= 1:
        return 1.0
    return float((0.1 * mscale * math.log(rope["factor"]) + 1.0) ** 2)


class Batch(NamedTuple):
    """One forward pass: requests, their new tokens' entry ids (B, S), positions (B, S), and scope."""

    requests: tuple[Request, ...]
    ids: Tensor
    positions: Tensor
    scope: Scope


class Chunk(NamedTuple):
    """A part of a document to prefill: `tokens` (S,) from token `start` on; it sees the documents
    `attached` and the document itself up to each token."""

    document: str
    start: int
    tokens: Tensor
    attached: tuple[str, ...]


class PrivateLayer(CacheLayerMixin):
    """One layer of `PrivateCache`; the rows themselves are in the runtime's pool."""

    is_sliding = False

    def __init__(self, engine: HFEngine, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._engine = engine
        self._layer = layer
        self.latent: Tensor | None = None
        self.stored = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to initialise: the pool was allocated when the runtime opened."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the new tokens' latents (B, 1, S, C) and rope keys (B, 1, S, R); give them back."""
        entries = torch.cat((key_states, value_states), dim=-1).flatten(0, 2)
        self.stored += key_states.shape[2]
        if self._engine.indexed(self._layer):
            self.latent = entries  # written together with the index keys, see `RuntimeIndexer`
        else:
            self._engine.write(self._layer, entries, None)
            self._engine.skip_select()
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return self._engine.batch.requests[0].position

    def get_max_length(self) -> int:
        return -1


class PrivateCache(Cache):
    """Holds only the private tokens of a batch of requests; positions count the corpus before them."""

    def __init__(self, engine: HFEngine, num_layers: int) -> None:
        self.private = [PrivateLayer(engine, layer) for layer in range(num_layers)]
        super().__init__(layers=list(self.private))

    def private_tokens(self, layer: int) -> int:
        """Tokens stored through this cache, a request."""
        return self.private[layer].stored


class RuntimeIndexer(nn.Module):
    """In place of the model's indexer: its projections, then `Runtime.select` over the corpus."""

    def __init__(self, engine: HFEngine, layer: int, original: Any) -> None:
        super().__init__()
        self.original = original
        self._engine = engine
        self._layer = layer

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: PrivateCache,
    ) -> Tensor:
        """Entry ids (B, S, K) int32 of what each token attends to, itself included."""
        index = self._engine.index_layout(self._layer)
        half = index.rope_dim // 2
        cos, sin = (table[..., :half].flatten(0, 1) for table in position_embeddings)
        hidden, resid = hidden_states.flatten(0, 1), q_resid.flatten(0, 1)
        original: Any = self.original
        norm, proj = original.k_norm, original.weights_proj
        key = index_key(hidden, original.wk.weight, norm.weight, norm.bias, cos, sin, index)
        query = index_query(resid, original.wq_b.weight, cos, sin, index)
        weights = head_weights(hidden.to(proj.weight.dtype), proj.weight, index)
        latent = past_key_values.private[self._layer].latent
        assert latent is not None
        self._engine.write(self._layer, latent, key)
        ids = self._engine.select(self._layer, query, weights)
        return ids.view(*hidden_states.shape[:2], -1)


class HFEngine:
    """A model and a runtime, tied together.

    Args:
        model: a `DeepseekV32ForCausalLM` or `GlmMoeDsaForCausalLM`, changed in place.
        runtime: opened with `model_layout(model.config)`.
        review: sees, and may replace, every selection.
    Raises: ValueError if the runtime was opened for another model, or for a lane of this one: a model
        of transformers computes all of its heads in one process.
    """

    def __init__(
        self, model: PreTrainedModel, runtime: Runtime, *, review: Review | None = None
    ) -> None:
        layouts = model_layout(model.config)
        ours = runtime.config.model
        shapes = [(layout.entry_dim, layout.index) for layout in layouts.layers]
        if shapes != [(layout.entry_dim, layout.index) for layout in ours.layers]:
            raise ValueError(
                "the runtime was opened for another model: its layers differ from the model's"
            )
        for whole, own in zip(layouts.layers, ours.layers, strict=True):
            if whole.heads != own.heads:
                raise ValueError(
                    f"the runtime has {own.heads} heads, the model {whole.heads}: HFEngine needs all "
                    "heads of its model, so open the runtime for that model and without lanes"
                )
        self.model = model
        self.runtime = runtime
        self.review = review
        self.observe: Observe | None = None
        self._in_wave = False
        self.batch = Batch(
            (), torch.empty(0), torch.empty(0), Scope(torch.empty(0), torch.empty(0))
        )
        AttentionInterface.register(IMPLEMENTATION, _attend)
        model.set_attn_implementation(IMPLEMENTATION)
        blocks: Any = model.model.layers
        for layer, block in enumerate(blocks):
            attention = block.self_attn
            latent = attention.kv_b_proj.weight.unflatten(0, (attention.num_heads, -1))
            w_uk, w_uv = latent.split((attention.qk_nope_head_dim, attention.v_head_dim), dim=1)
            runtime.load_weights(layer, w_uk[None], w_uv.mT[None])
            attention.qroam = self
            attention.expand_kv = _nothing_expanded
            if isinstance(attention.indexer, RuntimeIndexer):
                raise ValueError("the model already belongs to another HFEngine")
            if attention.indexer is not None:
                attention.indexer = RuntimeIndexer(self, layer, attention.indexer)

    @property
    def num_layers(self) -> int:
        return len(self.runtime.config.model.layers)

    def cache(self) -> PrivateCache:
        """A cache for a batch of requests, to be passed to each of its forward passes."""
        return PrivateCache(self, self.num_layers)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        requests: Sequence[Request],
        cache: PrivateCache,
        *,
        logits: bool = True,
    ) -> Tensor | None:
        """The next S tokens of each request, (B, S) int64; logits (B, V) of the last, or None.

        One layer-step of the world per layer: every rank calls this, or `idle`, together.
        """
        length = tokens.shape[1]
        positions = torch.stack(
            [torch.arange(request.position, request.position + length) for request in requests]
        )
        ids = torch.stack([self.runtime.append(request, length) for request in requests])
        scope = self.runtime.scope(requests=list(zip(requests, ids, strict=True)))
        self.batch = Batch(tuple(requests), ids, positions, scope)
        # The runtime decides what is visible; the model only insists on a mask with four dims.
        kinds: Any = self.model.config.layer_types
        no_mask = dict.fromkeys(kinds, torch.zeros(len(tokens), 1, length, 1))
        hidden = self.model.model(
            input_ids=tokens,
            attention_mask=no_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        if not logits:
            return None
        result: Tensor = self.model.lm_head(hidden[:, -1])
        return result

    def idle(self, layer: int) -> None:
        """Take part in one layer-step without queries."""
        if self.indexed(layer):
            self.runtime.idle_select(layer)
        self.runtime.idle_attend(layer)

    def prefill(self, chunks: Sequence[Chunk], report: Callable[[int], None] | None = None) -> None:
        """Write documents through the model, chunk c on rank c modulo the world, layers in a wave.

        A chunk is at a layer one step after the chunk before it, whose entries it then sees; so as
        many chunks are under way as the model has layers. With entries on GPUs, where all ranks are at
        the same layer, it is one at a time. Called with equal chunks on every rank.
        """
        self._in_wave = self.runtime.config.device == "cpu"  # a step on GPUs is of one layer
        starts: Sequence[int] = range(0, len(chunks) * self.num_layers, self.num_layers)
        if self._in_wave:
            starts = wave(len(chunks), self.runtime.world_size, self.num_layers)
        step = 0
        for c in range(self.runtime.rank, len(chunks), self.runtime.world_size):
            chunk = chunks[c]
            step = self._idle_until(starts[c], step)
            request = self.runtime.request(chunk.attached, into=chunk.document, start=chunk.start)
            self.forward(chunk.tokens[None], [request], self.cache(), logits=False)
            self.runtime.release(request)
            step += self.num_layers
            if report is not None:
                report(c + 1)
        self._idle_until(starts[-1] + self.num_layers if starts else 0, step)
        self._in_wave = False

    def _idle_until(self, end: int, step: int) -> int:
        for at in range(step, end):
            self.idle(0 if self._in_wave else at % self.num_layers)
        return max(step, end)

    def skip_select(self) -> None:
        """At a layer without an indexer: in a wave other ranks are at layers with one, and ask."""
        if self._in_wave:
            self.runtime.idle_select(0)

    def indexed(self, layer: int) -> bool:
        """Whether the layer has an indexer of its own."""
        return self.runtime.config.model.layers[layer].index is not None

    def index_layout(self, layer: int) -> IndexLayout:
        index = self.runtime.config.model.layers[layer].index
        assert index is not None
        return index

    def write(self, layer: int, entries: Tensor, index_keys: Tensor | None) -> None:
        self.runtime.write(layer, self.batch.ids.flatten(), entries, index_keys)

    def select(self, layer: int, query: Tensor, weights: Tensor) -> Tensor:
        selection = self.runtime.select(layer, query, weights, scope=self.batch.scope)
        if self.review is not None:
            selection = self.review(layer, self.batch, selection)
        return selection.ids

    def attend(self, layer: int, query: Tensor, ids: Tensor) -> Tensor:
        selection = self.runtime.selection(ids, self.batch.scope)
        out = self.runtime.attend(layer, query, selection)
        if self.observe is not None:
            self.observe(layer, query, selection, out)
        return out


def wave(num_chunks: int, world_size: int, num_layers: int) -> list[int]:
    """The step at which each chunk enters layer 0: after its predecessor, on a rank that is free."""
    starts: list[int] = []
    for c in range(num_chunks):
        after = starts[c - 1] + 1 if c else 0
        free = starts[c - world_size] + num_layers if c >= world_size else 0
        starts.append(max(after, free))
    return starts


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    indices: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, S, D), `indices` (B, S, K) from the indexer."""
    engine: HFEngine = module.qroam
    layout = engine.runtime.config.model.layers[module.layer_idx]
    if abs(scaling - layout.softmax_scale) > 1e-9:
        raise ValueError(f"the model scales by {scaling}, the layout by {layout.softmax_scale}")
    rows = query.transpose(1, 2).flatten(0, 1)
    out = engine.attend(module.layer_idx, rows.contiguous(), indices.flatten(0, 1))
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


def _nothing_expanded(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """In place of `expand_kv`: the attention function reads the pool, not expanded rows."""
    return kv_nope, k_rot
