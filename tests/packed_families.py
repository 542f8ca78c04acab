"""Language models of many families, small, and the gradient of a packed row beside that of each
sample alone."""

from __future__ import annotations

import copy

import torch

from accum_trainer import causal_lm_loss
from accum_trainer.sources.collating import PackingCollator
from tests.reference import IGNORE, make_rows, num_targets

EXACT = 2e-6
ROWS = make_rows(5)
TOKENS = torch.tensor([token for row in ROWS for token in row["input_ids"]])
SIZES = dict(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    max_position_embeddings=512,
)
EXPERTS = dict(
    experts_implementation="eager", num_experts_per_tok=2
)  # the fused experts take no float64
LINEAR = dict(
    linear_num_value_heads=2,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
    head_dim=16,
)
STATE_SPACE = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8)
# Windows of 6 tokens: samples are longer, and rows longer still. Convolutions are 4 wide, or 3
# (LFM2).
KEEPS_APART = {
    "Llama": {},
    "GPT2": dict(n_embd=32, n_layer=2, n_head=2),  # with its dropout of 0.1
    "Qwen2": {},
    "Gemma2": dict(
        head_dim=16, query_pre_attn_scalar=16, sliding_window=6, final_logit_softcapping=2.0
    ),
    "Gemma3Text": dict(
        head_dim=16, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "Mistral": dict(sliding_window=6),
    "Mixtral": dict(num_local_experts=4) | EXPERTS,
    "Llama4Text": dict(
        head_dim=16,
        attention_chunk_size=6,
        num_local_experts=2,
        intermediate_size_mlp=32,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "GPTNeoX": {},
    "GPTNeo": dict(
        num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=6
    ),
    "Phi3": {},
    "Doge": dict(keep_window_size=512),  # adds to the mask
}
SEES_OTHERS = {
    "GptOss": dict(head_dim=16, sliding_window=6, num_local_experts=4) | EXPERTS,
    "Mamba": dict(state_size=4),
    "Mamba2": dict(num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8),
    "FalconMamba": dict(state_size=4),
    "RecurrentGemma": dict(lru_width=32, attention_window_size=6, num_hidden_layers=3, head_dim=16),
    "Qwen3Next": LINEAR
    | EXPERTS
    | dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "Qwen3_5Text": LINEAR,
    "FalconH1": dict(
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
        head_dim=16,
    ),
    "Lfm2": dict(layer_types=["conv", "full_attention"]),
    "Bamba": STATE_SPACE | dict(attn_layer_indices=[1]),
    "GraniteMoeHybrid": STATE_SPACE
    | dict(layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=64),
    "Jamba": EXPERTS
    | dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
    | dict(num_experts=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
    "Zamba2": dict(
        mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=16, chunk_size=8
    )
    | dict(layers_block_type=["mamba", "hybrid"], num_mem_blocks=1, adapter_rank=4),
    "MiniMax": EXPERTS
    | dict(
        num_local_experts=2,
        layer_types=["linear_attention", "full_attention"],
        block_size=8,
        head_dim=16,
    ),
    "Rwkv": dict(attention_hidden_size=32),
    "Bloom": dict(n_layer=2, n_head=2),  # positions by ALiBi, which packing does not reach
    "Mpt": dict(d_model=32, n_heads=2, n_layers=2, max_seq_len=512),
    "OPT": dict(ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
}
FAMILIES = KEEPS_APART | SEES_OTHERS


def make(name: str, **options) -> torch.nn.Module:
    """Initialised by its configuration: small weights, so that leaks are small too."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | FAMILIES[name] | options))
    config.use_cache = False
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, name + head, None) or getattr(
        transformers, name.removesuffix("Text") + head
    )
    return model(config).train()


def gradient_apart(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of the mean over ROWS' targets, each row alone in float64."""
    exact = copy.deepcopy(model).double().eval()
    for row in ROWS:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        log_p = (
            exact(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].log_softmax(-1)
        )
        picked = log_p.gather(-1, labels[1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        (-(picked * (labels[1:] != IGNORE)).sum() / num_targets(ROWS)).backward()
    return {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}


def gradient_packed(model: torch.nn.Module, boundaries=()) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).eval()
    causal_lm_loss(model, PackingCollator(boundaries)(ROWS)).backward()
    return {
        name: p.grad / num_targets(ROWS)
        for name, p in model.named_parameters()
        if p.grad is not None
    }
