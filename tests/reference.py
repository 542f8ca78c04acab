"""What the truth is: small models, ragged rows, and one float64 big batch computed without any code
of the package."""

from __future__ import annotations

import copy

import numpy as np
import torch

VOCABULARY = 97
IGNORE = -100


def make_rows(
    count: int, seed: int = 0, longest: int = 40, all_masked: tuple[int, ...] = ()
) -> list[dict]:
    """`count` samples of 2 to `longest` tokens, a random prompt masked; those in `all_masked` have
    no target at all."""
    rng = np.random.RandomState(seed)
    rows = []
    for index in range(count):
        length = int(rng.randint(2, longest + 1))
        ids = rng.randint(1, VOCABULARY, length).tolist()
        prompt = length if index in all_masked else int(rng.randint(0, length))
        rows.append({"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]})
    return rows


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """One padded batch, by plain Python."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key, value):
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    mask = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    )
    return {
        "input_ids": filled("input_ids", 0),
        "attention_mask": mask,
        "labels": filled("labels", IGNORE),
    }


def num_targets(rows: list[dict]) -> int:
    return sum(label != IGNORE for row in rows for label in row["labels"][1:])


def make_model(kind: str, seed: int = 0) -> torch.nn.Module:
    """A small model in float32: `llama`, `gpt2`, or `lora` (a Llama whose adapters alone are
    trained)."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=512,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return GPT2LMHeadModel(config)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    )
    if kind == "llama":
        return llama
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        llama, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():  # B starts at zero, which would make every gradient of A zero
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def big_batch(model: torch.nn.Module, rows: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over the targets of `rows` and its gradient, as one batch in float64: (loss, name
    -> gradient)."""
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    batch = pad(rows)
    logits = exact(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probability = torch.log_softmax(logits[:, :-1], dim=-1)
    labels = batch["labels"][:, 1:]
    picked = log_probability.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss = -(picked * (labels != IGNORE)).sum() / num_targets(rows)
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in exact.named_parameters() if p.grad is not None
    }


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same tensors, to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def relative_error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over all gradients together, relative to the norm of the exact one."""
    assert found.keys() == exact.keys(), found.keys() ^ exact.keys()
    difference = sum(((found[name].double() - exact[name]) ** 2).sum().item() for name in exact)
    return (difference / sum((g**2).sum().item() for g in exact.values())) ** 0.5
