"""Load or build the model and its tokenizer, add LoRA, compile blocks, checksum weights.

Knows transformers, peft and the configuration of `train`, but no engine and no data.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from accum_trainer.config import TrainConfig
from accum_trainer.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

TINY = "tiny"
_MODEL_REMEDY = f"; give a folder that save_pretrained wrote, a hub id, or `{TINY}`"


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of `config.model`, with the configuration's chat template if it names one.

    Raises:
        ConfigError: the model has no tokenizer, or the template is no Jinja file.
    """
    tokenizer = _tokenizer(config)
    if config.chat_template is not None:
        tokenizer.chat_template = _template(config.chat_template)
    return tokenizer


def _template(path: str) -> str:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template={path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    # transformers adds a tag to Jinja, {% generation %}, which does not matter here.
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)
        )
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"chat_template={path} line {error.lineno} is not Jinja: {error.message}"
        ) from None
    return text


def _tokenizer(config: TrainConfig) -> Any:
    if config.model == TINY:
        from accum_trainer.data.embedded import corpus_tokenizer

        return corpus_tokenizer()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(config.model, **source_of(config))
    except Exception as error:  # hub, file and parser errors of many types, one remedy
        raise _not_loaded(config, "gives no tokenizer", error) from None


def source_of(config: TrainConfig) -> dict[str, Any]:
    """The arguments that every `from_pretrained(config.model)` gets.

    transformers asks on the terminal whether to run a model's code unless it is told.

    Raises:
        ConfigError: a path where no folder is; a revision of a folder, which has none.
    """
    # The hub would be asked for it, and complain about the name.
    is_path = config.model.startswith((".", "/", "~")) or config.model.count("/") > 1
    if is_path and not Path(config.model).is_dir():
        raise ConfigError(f"model={config.model}: there is no such folder{_MODEL_REMEDY}")
    if not Path(config.model).is_dir():
        _say_where_it_is_looked_for(config.model)
    if config.revision is None:
        return {"trust_remote_code": config.trust_remote_code}
    if Path(config.model).is_dir():
        raise ConfigError(
            f"revision={config.revision} is for models from the hub, and model={config.model} is a "
            "folder; leave it out"
        )
    return {"trust_remote_code": config.trust_remote_code, "revision": config.revision}


@functools.cache
def _say_where_it_is_looked_for(model: str) -> None:
    """Say once that a model is asked of the hub, which may take long to answer, or not answer: the
    name of a folder that is not here looks the same."""
    from huggingface_hub import try_to_load_from_cache

    is_cached = isinstance(try_to_load_from_cache(model, "config.json"), str)
    if not is_cached and os.environ.get("RANK", "0") == "0":
        logger.warning("model=%s is no folder here; it is looked for on the hub", model)


def _not_loaded(config: TrainConfig, what: str, error: Exception) -> ConfigError:
    """The error of a `from_pretrained` that failed."""
    if isinstance(error, ConfigError):
        return error
    if "trust_remote_code" in str(error) and not config.trust_remote_code:
        return ConfigError(
            f"model={config.model} wants to run Python code that comes with it; read the code, "
            "then allow it with --trust-remote-code, or take another model"
        )
    return ConfigError(f"model={config.model} {what}: {first_line(error)}{_MODEL_REMEDY}")


def stored_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of the checkpoint that `config.model` names; float32 for `tiny`."""
    if config.model == TINY:
        return torch.float32
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(config.model, **source_of(config)).dtype
    except Exception:  # `load_model` reports it
        return torch.float32
    return found if isinstance(found, torch.dtype) else torch.float32


def frozen_dtype(config: TrainConfig, mixed_precision: str) -> torch.dtype:
    """The dtype of the weights that LoRA does not train.

    The checkpoint's dtype if the forward computes in it anyway: float32 copies would double the
    memory and add no precision. Otherwise float32, as `mixed_precision=no` promises.
    """
    computed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    stored = stored_dtype(config) if config.use_peft and computed is not None else None
    return computed if computed is not None and stored == computed else torch.float32


def load_model(config: TrainConfig, tokenizer: Any, frozen: torch.dtype = torch.float32) -> Any:
    """Build or load the causal language model in float32, as configured.

    Random weights (of `tiny`, of new adapters) come from torch's generator: seed it first.

    Args:
        config: names the model, LoRA, attention and gradient checkpointing.
        tokenizer: of the model.
        frozen: dtype of the weights that LoRA does not train; see `frozen_dtype`.

    Raises:
        ConfigError: the model cannot be loaded, has fewer positions than max_seq_len or fewer
            embeddings than its tokenizer has tokens, or lacks the modules for LoRA.
    """
    model = _tiny(tokenizer) if config.model == TINY else _pretrained(config, frozen)
    weight = model.get_input_embeddings().weight
    embeddings = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 shards while loading
    if len(tokenizer) > embeddings:
        raise ConfigError(
            f"the tokenizer of model={config.model} has {len(tokenizer)} tokens, its embedding "
            f"only {embeddings} rows"
        )
    return _ready(model, config)


def shape_of_model(config: TrainConfig, frozen: torch.dtype = torch.float32) -> Any:
    """The model of `load_model`, built from its configuration without reading a weight.

    Call it inside `torch.device("meta")`, where tensors have shapes and no memory.

    Args:
        config, frozen: as for `load_model`.

    Raises:
        ConfigError: the configuration cannot be found, is not of a causal language model, or does
            not allow these options.
    """
    is_tiny = config.model == TINY
    model = _tiny(load_tokenizer(config)) if is_tiny else _from_configuration(config, frozen)
    return _ready(model, config)


def _ready(model: Any, config: TrainConfig) -> Any:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and config.max_seq_len > positions:
        raise ConfigError(
            f"max_seq_len={config.max_seq_len} is more than the {positions} positions of "
            f"model={config.model}; use max_seq_len={positions} or less"
        )
    model.config.use_cache = False
    _set_router_loss(model, config)
    if config.attention is not None:
        _set_attention(model, config)
    if config.use_peft:
        model = _with_lora(model, config)
    if config.gradient_checkpointing:
        # Reentrant checkpointing runs autograd inside the backward, which DDP does not see.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _set_router_loss(model: Any, config: TrainConfig) -> None:
    """Make a mixture of experts return its router's loss, if it has a coefficient and is wanted."""
    for holder in (model.config, getattr(model.config, "text_config", None)):
        if holder is not None and hasattr(holder, "output_router_logits"):
            has_coefficient = bool(getattr(holder, "router_aux_loss_coef", 0.0))
            holder.output_router_logits = has_coefficient and config.router_loss == "auto"


def _set_attention(model: Any, config: TrainConfig) -> None:
    wrong = f"attention={config.attention} cannot be used with model={config.model}: "
    remedy = "; install what is missing, or use sdpa or eager"
    from accum_trainer.lm.packed_attention import PACKED_SDPA, attend_inside_samples

    if config.attention == PACKED_SDPA:
        if not attend_inside_samples(model):
            raise ConfigError(f"{wrong}it is for models that run sdpa{remedy}")
        return
    try:
        model.set_attn_implementation(config.attention)
    except Exception as error:  # a missing package, an unknown name
        raise ConfigError(f"{wrong}{first_line(error)}{remedy}") from None
    # Older models only warn and keep theirs. transformers has no public name for the one in use.
    found = model.config._attn_implementation  # noqa: SLF001
    if found != config.attention and not (is_flash(found) and is_flash(str(config.attention))):
        raise ConfigError(f"{wrong}its code offers no choice of attention and runs {found}{remedy}")


def is_flash(attention: str) -> bool:
    """Whether this name means flash attention; the hub's kernels put a path before it."""
    return "flash" in attention


def blocks_of(model: Any) -> list[torch.nn.Module]:
    """The repeated blocks of a model, such as decoder layers; [] if it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [
        module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names
    ]


def compile_blocks(model: Any, device: torch.device) -> int:
    """Compile each block in place at its first call; return the number of blocks.

    Names, weights and hooks stay. Compiling blocks rather than the whole model lets them share the
    compiled code and leaves the output head to the loss path. Shapes are dynamic, so one
    compilation serves all sizes of micro-batches; training needs three and evaluation three more
    (several samples with and without padding, one sample). Two settings of torch change: up to 16
    compilations of a block, and DDP does not split the small blocks at its buckets.

    Raises:
        ConfigError: torch.compile does not work on this machine, or the model names no blocks.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigError(
            f"compile=true compiles the blocks of a model, and {type(model).__name__} names none "
            "(_no_split_modules); leave it out"
        )
    try:
        torch.compile(torch.sin, dynamic=True)(torch.ones(3, device=device))
    except Exception as error:  # of many types: no compiler, no Triton, no writable folder
        raise ConfigError(
            f"compile=true does not work here: {first_line(error)}; install a C++ compiler (on a "
            "GPU, Triton), or leave it out"
        ) from None
    import torch._dynamo.config as dynamo

    # Beyond the limit, 8 by default, torch runs uncompiled. Six are expected; hooks and dtypes may
    # add more.
    dynamo.recompile_limit = max(16, dynamo.recompile_limit)
    dynamo.optimize_ddp = False
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(all parameters, trained parameters)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def fingerprint(model: torch.nn.Module) -> str | None:
    """`checksum` of the weights; it differs for another seed, another model or further training.

    None if this process has them not whole: they were sharded while loading, or another has them.
    """
    if any(hasattr(p, "ds_id") or p.is_meta for p in model.parameters()):
        return None
    return checksum(model.named_parameters())


def checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Eight hex digits over (name, tensor), from at most 4,096 evenly spaced numbers of each."""
    found = 0
    for name, tensor in tensors:
        flat = tensor.detach().flatten()
        spaced = flat[:: max(1, flat.numel() // 4096)].double().cpu().contiguous()
        found = zlib.crc32(f"{name} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(spaced.numpy().tobytes(), found)
    return f"{found:08x}"


def _tiny(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _pretrained(config: TrainConfig, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype, **source_of(config))
    except Exception as error:  # hub, file, parser and architecture errors, one remedy
        raise _not_loaded(config, "cannot be loaded", error) from None


def _from_configuration(config: TrainConfig, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        source = source_of(config)
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(config.model, **source),
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:  # as in _pretrained
        raise _not_loaded(config, "cannot be found", error) from None


def _with_lora(model: Any, config: TrainConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=_names(targets) or "all-linear",
        modules_to_save=_names(config.lora_modules_to_save),
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, lora)
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # 16-bit weights would round small updates away
                parameter.data = parameter.data.float()
        return adapted
    except ValueError as error:
        linear = sorted(
            {
                name.rpartition(".")[2]
                for name, m in model.named_modules()
                if isinstance(m, torch.nn.Linear)
            }
        )
        raise ConfigError(
            f"lora_target_modules={targets} cannot be adapted: {first_line(error)}; this model's "
            f"linear modules are {', '.join(linear)}"
        ) from None


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",")] if text else None
