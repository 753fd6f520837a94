"""The demo's model, corpus and unsharded reference.

A small DeepSeek-V3.2-architecture model with seeded weights: its text is noise, its arithmetic is
real. The reference is transformers' own eager decode of that model over the whole corpus in one
process.
"""

from __future__ import annotations

import copy
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ...gpu.limits import Device
from .near_ties import NearTies, TopkRecorder, recording

PROMPT_TOKENS = 24
CHUNK_TOKENS = 256


def build_model(layers: int, seed: int, max_tokens: int, device: Device = "cpu") -> PreTrainedModel:
    """The model every instance and the reference build for themselves; with entries on GPUs one whose
    entries have a width that the kernels accept. It runs on the CPU."""
    latent, rope = (64, 16) if device == "cpu" else (128, 64)
    config = DeepseekV32Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,  # a near-tie of experts would be as arbitrary as one of entries
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=64,
        kv_lora_rank=latent,
        qk_nope_head_dim=32,
        qk_rope_head_dim=rope,
        v_head_dim=32,
        index_n_heads=8,  # with 4, every 16th token weighs all heads negatively: thousands of exact ties
        index_head_dim=2 * rope,
        index_topk=256,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=64,
        max_position_embeddings=max_tokens,
        initializer_range=0.08,  # at 0.02 even a dropped holder leaves the greedy tokens equal
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = DeepseekV32ForCausalLM(config)
    model.eval()
    return model


def load_corpus(folder: Path | None, files: int, bytes_per_file: int) -> dict[str, Tensor]:
    """Names and byte tokens (n,) int64 of the first files; Python's own library by default.

    Raises: ValueError if there is nothing to read.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix in _SOURCES)
    if folder is None:
        paths = [
            path for path in sorted(root.glob("*.py")) if path.stat().st_size >= bytes_per_file
        ]
    documents: dict[str, Tensor] = {}
    for path in paths:
        if len(documents) == files:
            break
        data = path.read_bytes()[:bytes_per_file]
        if data:
            name = str(path.relative_to(root))
            documents[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    if not documents:
        raise ValueError(f"no source files under {root}; looked for {', '.join(sorted(_SOURCES))}")
    return documents


_SOURCES = frozenset(
    {
        ".py",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".cu",
        ".go",
        ".rs",
        ".js",
        ".ts",
        ".java",
        ".md",
        ".txt",
        ".toml",
    }
)


def prompts(documents: dict[str, Tensor], agents: int) -> Tensor:
    """(agents, PROMPT_TOKENS) int64: each sub-agent asks about a file of its own."""
    names = list(documents)
    texts = [
        f"agent {a} reads {names[a % len(names)]}: ".ljust(PROMPT_TOKENS, ".")
        for a in range(agents)
    ]
    return torch.tensor([list(text.encode()[:PROMPT_TOKENS]) for text in texts])


class Reference(NamedTuple):
    """Greedy tokens (A, steps) int64 and logits (A, steps, V) of the unsharded model."""

    tokens: Tensor
    logits: Tensor
    ties: NearTies
    rows: int


def run_reference(
    model: PreTrainedModel,
    chunks: Sequence[Tensor],
    agent_prompts: Tensor,
    steps: int,
    report: Callable[[str, int, int], None],
) -> Reference:
    """Prefill the chunks in order, then let each agent decode `steps` tokens greedily, unsharded."""
    recorder = TopkRecorder()
    with recording(model, recorder), torch.no_grad():
        corpus = DynamicCache(config=model.config)
        for c, tokens in enumerate(chunks):
            model.model(input_ids=tokens[None], past_key_values=corpus, use_cache=True)
            recorder.position += len(tokens)
            report("reference prefill", c + 1, len(chunks))
        tokens_of, logits_of = [], []
        corpus_tokens = recorder.position
        for agent, prompt in enumerate(agent_prompts):
            recorder.sequence, recorder.position = agent, corpus_tokens
            tokens, logits = _greedy(model, copy.deepcopy(corpus), prompt, steps, recorder)
            tokens_of.append(tokens)
            logits_of.append(logits)
            report("reference decode", agent + 1, len(agent_prompts))
    ties = recorder.ties(model.config.index_topk)
    return Reference(torch.stack(tokens_of), torch.stack(logits_of), ties, recorder.rows)


def _greedy(
    model: PreTrainedModel, cache: DynamicCache, prompt: Tensor, steps: int, recorder: TopkRecorder
) -> tuple[Tensor, Tensor]:
    tokens, logits, current = [], [], prompt[None]
    for _ in range(steps):
        out = model(input_ids=current, past_key_values=cache, use_cache=True, logits_to_keep=1)
        recorder.position += current.shape[1]
        logits.append(out.logits[0, -1])
        current = logits[-1].argmax().reshape(1, 1)
        tokens.append(current[0, 0])
    return torch.stack(tokens), torch.stack(logits)
