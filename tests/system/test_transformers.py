"""The adapter against transformers' own unsharded eager decode: V3.2 and GLM, on 2 and 4 ranks."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from effort import slow_after
from gpu_world import StandIns
from ranks import run_loopback
from torch import Tensor
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    PreTrainedModel,
)

from qroam.partition.placement import Placement
from qroam.runtime import Runtime, RuntimeConfig
from qroam.runtime.adapters.hf import Chunk, HFEngine, model_layout, wave
from qroam.runtime.tools.demo.model import Reference, build_model, run_reference
from qroam.runtime.tools.demo.near_ties import TieReview
from qroam.runtime.transport.base import Transport

STEPS, CHUNK, PROMPT, AGENTS = 8, 64, 12, 4
SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "index_n_heads": 8,
    "index_head_dim": 32,
    "index_topk": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 512,
}


def make_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(7)
    glm, deepseek = cast(Any, GlmMoeDsaConfig), cast(Any, DeepseekV32Config)
    model: Any
    if kind == "glm_moe_dsa":
        # Layers full, full, shared, full: one reuses its predecessor's indices.
        config = glm(**SMALL, num_hidden_layers=4, first_k_dense_replace=4, index_topk_freq=2)
        model = GlmMoeDsaForCausalLM(config)
    else:
        rope = {"rope_parameters": YARN} if kind == "deepseek_v32-yarn" else {}
        config = deepseek(**SMALL, **rope, num_hidden_layers=3, first_k_dense_replace=3)
        model = DeepseekV32ForCausalLM(config)
    model.eval()
    return cast(PreTrainedModel, model)


def documents() -> dict[str, Tensor]:
    """Byte-like tokens of three documents; the second does not end at a block or chunk."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"a": 192, "b": 150, "c": 128}
    return {name: torch.randint(256, (n,), generator=generator) for name, n in sizes.items()}


def chunks() -> list[Chunk]:
    names = list(documents())
    return [
        Chunk(name, c * CHUNK, tokens, tuple(names[:d]))
        for d, name in enumerate(names)
        for c, tokens in enumerate(documents()[name].split(CHUNK))
    ]


def agent_prompts() -> Tensor:
    return torch.randint(256, (AGENTS, PROMPT), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[PreTrainedModel, Reference]]:
    done = {}
    for kind in ("deepseek_v32", "deepseek_v32-yarn", "glm_moe_dsa"):
        model = make_model(kind)
        tokens = [chunk.tokens for chunk in chunks()]
        done[kind] = model, run_reference(model, tokens, agent_prompts(), STEPS, lambda *_: None)
    return done


def decode(
    model: PreTrainedModel, reference: Reference, transport: Transport, index_placement: str
) -> dict[str, Any]:
    """Prefill and decode as one rank; what it saw."""
    sequence_of: dict[int, int] = {}
    review = TieReview(reference.ties, sequence_of)
    mine = range(transport.rank, AGENTS, transport.world_size)
    config = RuntimeConfig(
        model=model_layout(model.config),
        max_blocks=32,
        block_tokens=16,
        corpus_slots=32,
        private_blocks=2 * len(mine),
        request_blocks=2,
        placement=Placement(policy="block-cyclic", run=2, copies=min(2, transport.world_size)),
        index_placement=index_placement,  # type: ignore[arg-type]
        mode="random",
        lease_entries=64,
        deadline_s=60.0,
    )
    with Runtime.open(config, transport) as runtime:
        engine = HFEngine(model, runtime, review=review)
        position = 0
        for name, tokens in documents().items():
            runtime.add_document(name, tokens=len(tokens), position=position)
            position += len(tokens)
        engine.prefill(chunks())
        requests = [runtime.request(list(documents())) for _ in mine]
        sequence_of.update({id(r): agent for r, agent in zip(requests, mine, strict=True)})
        cache = engine.cache()
        current, tokens_out, logits_out = agent_prompts()[list(mine)], [], []
        for _ in range(STEPS):
            logits = engine.forward(current, requests, cache)
            assert logits is not None
            current = logits.argmax(-1, keepdim=True)
            tokens_out.append(current[:, 0])
            logits_out.append(logits)
        private = PROMPT + STEPS - 1
        assert [cache.private_tokens(layer) for layer in range(engine.num_layers)] == (
            [private] * engine.num_layers
        )
        assert cache.get_seq_length() == position + private  # positions count the corpus
        return {
            "agents": list(mine),
            "tokens": torch.stack(tokens_out, 1),
            "logits": torch.stack(logits_out, 1),
            "review": review,
        }


@pytest.mark.parametrize("index_placement", slow_after(1, ["with-blocks", "replicated"]))
@pytest.mark.parametrize("world_size", slow_after(1, [2, 4]))
@pytest.mark.parametrize("kind", ["deepseek_v32", "deepseek_v32-yarn", "glm_moe_dsa"])
def test_decode_equals_the_unsharded_model(
    references: dict[str, tuple[PreTrainedModel, Reference]],
    kind: str,
    world_size: int,
    index_placement: str,
) -> None:
    model, reference = references[kind]
    models = [copy.deepcopy(model) for _ in range(world_size)]
    results = run_loopback(
        world_size,
        lambda end: decode(models[end.rank], reference, end, index_placement),
    )
    rows = sum(result["review"].rows for result in results)
    substituted = sum(result["review"].substituted for result in results)
    assert substituted <= 0.01 * rows, f"{substituted} of {rows} selections taken in near-ties"
    for result in results:
        for seat, agent in enumerate(result["agents"]):
            assert torch.equal(result["tokens"][seat], reference.tokens[agent])
            ours = result["logits"][seat].log_softmax(-1)
            theirs = reference.logits[agent].log_softmax(-1)
            assert float((ours - theirs).abs().max()) <= 1e-4


def test_no_corpus_row_is_expanded(
    references: dict[str, tuple[PreTrainedModel, Reference]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kv_b_proj` would expand latents to per-head rows; the engine never calls it."""
    model, reference = references["deepseek_v32"]
    model = copy.deepcopy(model)
    expanded = []
    blocks: Any = model.model.layers
    for block in blocks:
        block.self_attn.kv_b_proj.register_forward_hook(lambda *_: expanded.append(1))
    run_loopback(1, lambda end: decode(model, reference, end, "with-blocks"))
    assert not expanded


def test_the_gate_would_notice_a_lost_holder(
    references: dict[str, tuple[PreTrainedModel, Reference]],
) -> None:
    """Sensitivity: the same comparison fails when one document is left out of every scope."""
    _, reference = references["deepseek_v32"]
    model = copy.deepcopy(references["deepseek_v32"][0])

    def without_last(transport: Transport) -> Tensor:
        config = RuntimeConfig(
            model=model_layout(model.config), max_blocks=32, block_tokens=16, private_blocks=2
        )
        with Runtime.open(config, transport) as runtime:
            engine = HFEngine(model, runtime)
            position = 0
            for name, tokens in documents().items():
                runtime.add_document(name, tokens=len(tokens), position=position)
                position += len(tokens)
            engine.prefill(chunks())
            request = runtime.request(["a", "c"])
            logits = engine.forward(agent_prompts()[:1], [request], engine.cache())
            assert logits is not None
            return logits[0]

    (logits,) = run_loopback(1, without_last)
    assert float((logits - reference.logits[0, 0]).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["deepseek_v32", "deepseek_v32-yarn", "glm_moe_dsa"])
def test_a_document_reads_the_same_wherever_it_is_attached(kind: str) -> None:
    """Prefilled at 0 and attached or leased at 700, or prefilled there: one text, the same logits."""
    model = make_model(kind)
    text = documents()["a"][:30]  # with the prompt, no more than the indexer selects

    def logits(runtime: Runtime, engine: HFEngine, attached: str | tuple[str, int]) -> Tensor:
        request = runtime.request(["far", attached])
        result = engine.forward(agent_prompts()[:1, :6], [request], engine.cache())
        assert result is not None
        runtime.release(request)
        return result

    def worker(transport: Transport) -> None:
        config = RuntimeConfig(
            model=model_layout(model.config), max_blocks=32, block_tokens=16, private_blocks=4
        )
        with Runtime.open(config, transport) as runtime:
            engine = HFEngine(model, runtime)
            runtime.add_document("far", tokens=8, position=692)
            runtime.add_document("here", tokens=30, position=0)
            runtime.add_document("there", tokens=30, position=700)
            parts = {"far": text[:8], "here": text, "there": text}
            engine.prefill([Chunk(name, 0, tokens, ()) for name, tokens in parts.items()])
            there = logits(runtime, engine, "there")
            moved = logits(runtime, engine, ("here", 700))
            request = runtime.request(["far"])
            runtime.copy_document(request, "here")
            leased = engine.forward(agent_prompts()[:1, :6], [request], engine.cache())
            assert leased is not None
            assert float((moved - there).abs().max()) < 1e-3
            assert float((leased - there).abs().max()) < 1e-3
            elsewhere = logits(runtime, engine, ("here", 350))
            assert float((elsewhere - there).abs().max()) > 3e-3

    run_loopback(1, worker)


def test_entries_on_gpus_give_the_same_logits() -> None:
    """All ranks at the same layer, chunk by chunk; the step is a stand-in."""
    size, steps = 16, 3
    texts = {name: tokens[:40] for name, tokens in documents().items()}
    parts = [
        Chunk(name, start, tokens[start : start + size], tuple(list(texts)[:at]))
        for at, (name, tokens) in enumerate(texts.items())
        for start in range(0, len(tokens), size)
    ]
    reference_model, *models = (build_model(2, 0, 512, "cuda") for _ in range(3))
    tokens_of = [part.tokens for part in parts]
    reference = run_reference(
        reference_model, tokens_of, agent_prompts()[:2], steps, lambda *_: None
    )
    config = RuntimeConfig(
        model=model_layout(reference_model.config),
        max_blocks=12,
        block_tokens=16,
        device="cuda",
        max_queries=32,
        max_units=256,
    )

    def worker(transport: Transport) -> Tensor:
        with Runtime.open(config, transport) as runtime:
            engine = HFEngine(models[transport.rank], runtime)
            position = 0
            for name, tokens in texts.items():
                runtime.add_document(name, tokens=len(tokens), position=position)
                position += len(tokens)
            engine.prefill(parts)
            request, cache = runtime.request(list(texts)), engine.cache()
            current, logits = agent_prompts()[transport.rank : transport.rank + 1], []
            for _ in range(steps):
                out = engine.forward(current, [request], cache)
                assert out is not None
                logits.append(out)
                current = out.argmax(-1, keepdim=True)
            return torch.stack(logits, 1)[0]

    with StandIns(config, 2):
        found = run_loopback(2, worker)
    for agent, logits in enumerate(found):
        assert float((logits - reference.logits[agent]).abs().max()) < 1e-4


def test_wave_keeps_order_and_ranks_free() -> None:
    for world_size in (1, 2, 4):
        for num_layers in (1, 3, 6):
            starts = wave(9, world_size, num_layers)
            assert all(b > a for a, b in pairwise(starts))
            for c in range(world_size, 9):
                assert starts[c] >= starts[c - world_size] + num_layers


def test_other_models_are_refused() -> None:
    config: Any = copy.copy(make_model("deepseek_v32").config)
    config.model_type = "llama"
    with pytest.raises(ValueError, match="llama"):
        model_layout(config)


def test_a_lane_of_the_model_is_refused() -> None:
    model = make_model("deepseek_v32")
    before = model.config._attn_implementation

    def worker(transport: Transport) -> None:
        config = RuntimeConfig(model=model_layout(model.config), max_blocks=4)
        with Runtime.open(config, transport, heads=(2 * transport.rank, 2)) as runtime:
            with pytest.raises(ValueError, match="has 2 heads, the model 4: HFEngine needs"):
                HFEngine(model, runtime)
            runtime.idle_attend(0)

    run_loopback(2, worker)
    assert model.config._attn_implementation == before
    with Runtime.open(RuntimeConfig(model=model_layout(model.config), max_blocks=4)) as runtime:
        HFEngine(model, runtime)  # nothing was changed
