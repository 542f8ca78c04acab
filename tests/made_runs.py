"""Run directories as training leaves them, made by hand: any weights, any number of samples, any
end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from accum_trainer.config import TrainConfig
from accum_trainer.data.embedded import corpus_tokenizer
from accum_trainer.lm.model import fingerprint, load_model

# Samples of three runs: shares that no binary fraction holds.
COUNTS = (3, 5, 9)
# Rows that are nowhere and none to evaluate on: no model is loaded unless a test wants it.
NO_EVALUATION = TrainConfig(dataset_file="nowhere.jsonl")


def make_run(
    folder: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
    num_samples: int = 4,
    config: TrainConfig = NO_EVALUATION,
    *,
    initial_weights: str = "0badcafe",
    shard: str | None = None,
    **result: object,
) -> Path:
    """Write a finished run; `weights` become its model/, which a test may also write itself."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    plan = {"initial_weights": initial_weights, "shard": shard, "total_updates": 10}
    (folder / "plan.json").write_text(json.dumps(plan))
    ended = {"done": True, "stopped_by": "", "updates": 10, "num_samples": num_samples} | result
    (folder / "result.json").write_text(json.dumps(ended))
    if weights is not None:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        save_file(dict(weights), folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return folder


def list_runs(folder: Path, *names: str) -> Path:
    """Write the independent.json of a parallel-independent run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "independent.json").write_text(
        json.dumps({"runs": [{"name": name, "settings": {}} for name in names]})
    )
    return folder


def small_llama(**options) -> LlamaForCausalLM:
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(corpus_tokenizer()), num_key_value_heads=1, **sizes, **options)
    )


def make_base(
    folder: Path, model: Any = None, dtype: torch.dtype = torch.float32, **options: Any
) -> TrainConfig:
    """A base model in `folder`/base, and the configuration of LoRA runs on it."""
    torch.manual_seed(5)
    model = (model or small_llama()).to(dtype)
    model.save_pretrained(folder / "base")
    corpus_tokenizer().save_pretrained(folder / "base")
    return TrainConfig(
        model=str(folder / "base"),
        use_peft=True,
        cpu=True,
        max_seq_len=64,
        dataset_file="nowhere.jsonl",
        **options,
    )


def initial_weights_of(config: TrainConfig) -> str:
    torch.manual_seed(config.seed)
    return fingerprint(load_model(config, corpus_tokenizer()))


def lora_run(
    folder, config: TrainConfig, num_samples: int, seed: int, dtype=torch.float32, **options
):
    """A run that ended with random adapters, and modules to save, of its own."""
    torch.manual_seed(config.seed)
    model = load_model(config.without_peft(), corpus_tokenizer())
    lora = (
        dict(r=4, lora_alpha=6.0, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        | options
    )
    adapted = get_peft_model(model, LoraConfig(**lora))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.to(dtype)
    make_run(
        folder, num_samples=num_samples, config=config, initial_weights=initial_weights_of(config)
    )
    adapted.save_pretrained(folder / "model")
    corpus_tokenizer().save_pretrained(folder / "model")
    return folder


def write_sums(path: Path, count: int) -> Path:
    """A data file of `count` small sums."""
    rows = [{"prompt": f"{n} plus {n} is ", "completion": f"{2 * n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
