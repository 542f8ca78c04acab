"""Models with output heads of many kinds, and the losses that they give on rows of both kinds."""

from __future__ import annotations

import torch

from accum_trainer import causal_lm_loss
from accum_trainer.losses.head import LossPath, decide_loss_path, set_loss_path
from accum_trainer.losses.patched_head import CHUNKED, SELECTED
from tests.reference import (
    VOCABULARY,
    make_rows,
    pad,
)

EXACT = 2e-6
# The third row has no target; the others have random prompts and lengths.
ROWS = make_rows(6, all_masked=(2,))
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
OWN_SIZES = {
    "GPT2": dict(n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "OPT": dict(ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
    "Bloom": dict(n_layer=2, n_head=2),
    "Gemma2": dict(head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=2.0),
    "Mixtral": dict(
        num_local_experts=4, experts_implementation="eager"
    ),  # the fused experts take no float64
    "Granite": dict(logits_scaling=8.0),
}
PATHS = {
    "Llama": CHUNKED,
    "GPT2": CHUNKED,
    "Qwen2": CHUNKED,
    "Gemma2": SELECTED,
    "OPT": CHUNKED,
    "Phi3": CHUNKED,
    "Mixtral": CHUNKED,
    "GPTNeoX": CHUNKED,
    "Bloom": CHUNKED,
    "Phi": CHUNKED,  # its head has a bias
    "Granite": SELECTED,
}


def make(name: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | OWN_SIZES.get(name, {})))
    model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")(
        config
    )
    with torch.no_grad():  # larger weights, so that logits and soft caps are not nearly linear
        for p in model.parameters():
            p.mul_(3) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    return model.train()


def gradient(
    model: torch.nn.Module, rows: list[dict] = ROWS, **options: float
) -> tuple[float, dict]:
    """Summed loss of `rows` and its gradient by name."""
    model.zero_grad()
    loss = causal_lm_loss(model, pad(rows), **options)
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def forced(model: torch.nn.Module, path: str) -> torch.nn.Module:
    set_loss_path(model, LossPath(path, "by the test"))
    return model


def path_of(model: torch.nn.Module) -> str:
    return decide_loss_path(model, torch.tensor([[5, 6, 7]])).path
