"""The indexers of transformers' models, with seeded weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf_v32
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as hf_glm
from transformers.models.glm_moe_dsa.configuration_glm_moe_dsa import GlmMoeDsaConfig

from qroam.partition.layout import Pairing

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 8,
}


def hf_indexer(pairing: Pairing) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(indexer, rotary embedding) of the model that pairs this way, with seeded weights."""
    if pairing == "half":
        config: Any = DeepseekV32Config(**TINY)
        parts: Any = hf_v32.DeepseekV32Indexer(config, 0), hf_v32.DeepseekV32RotaryEmbedding(config)
    else:
        config = GlmMoeDsaConfig(**TINY)
        parts = hf_glm.GlmMoeDsaIndexer(config, 0), hf_glm.GlmMoeDsaRotaryEmbedding(config)
    generator = torch.Generator().manual_seed(5)
    for parameter in parts[0].parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return parts[0], parts[1]
