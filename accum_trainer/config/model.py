"""The section Model: which model, in which precision, trained whole or through adapters."""

from dataclasses import dataclass

from accum_trainer.config.option import Section, option
from accum_trainer.errors import ConfigError


@dataclass(frozen=True)
class ModelOptions(Section):
    """The model, its precision and its adapters."""

    model: str = option(
        "tiny",
        "A path, a hub id, or `tiny`, a small Llama that needs no download.",
        may_be_path=True,
    )
    revision: str | None = option(
        None, "The branch, tag or commit of a model from the hub. Default: its main branch."
    )
    trust_remote_code: bool = option(
        False,
        "Let the model run Python code that comes with it. Accepted on the command line and from "
        "the environment, not from a file.",
        not_from_files=True,
    )
    max_seq_len: int = option(512, "Most tokens in one sample.", minimum=2)
    mixed_precision: str | None = option(
        None,
        "Autocast dtype of the forward pass. Default: what the launcher says, else no.",
        choices=("no", "bf16", "fp16"),
        other_flags=("--precision",),  # as in `config create`
    )
    amp: bool = option(False, "Mixed precision in the best dtype of this device (bf16, else fp16).")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward: less memory, more time."
    )
    activation_offload: bool = option(
        False,
        "Keep the input of each block in host memory until its backward: less memory of a GPU on "
        "long samples, more time.",
        only_with="gradient_checkpointing",
    )
    attention: str | None = option(
        None,
        "transformers' attention implementation, such as sdpa, eager or flash_attention_2. "
        "Default: the model's own choice.",
    )
    compile: bool = option(
        False, "Compile the model's blocks with torch.compile, once for all sample lengths."
    )
    use_peft: bool = option(False, "Train LoRA adapters instead of the whole model.")
    lora_r: int = option(16, "Rank of the LoRA adapters.", minimum=1, only_with="use_peft")
    lora_alpha: float = option(
        32.0,
        "LoRA scale: adapters act with lora_alpha / lora_r.",
        above=0,
        only_with="use_peft",
    )
    lora_dropout: float = option(
        0.0,
        "Dropout before the adapters, 0 to below 1.",
        minimum=0,
        below=1,
        only_with="use_peft",
    )
    lora_target_modules: str | None = option(
        None,
        "Modules to adapt, such as q_proj,v_proj. Default: all linear layers but the output head.",
        only_with="use_peft",
    )
    lora_modules_to_save: str | None = option(
        None,
        "Modules to train whole beside the adapters and save with them, such as lm_head.",
        only_with="use_peft",
    )
    merge_adapter: bool = option(
        False,
        "With --use-peft, also write the base model with the adapter merged in, to model-merged/.",
    )

    def _check_rules(self) -> None:
        super()._check_rules()
        if self.amp and self.mixed_precision is not None:
            raise ConfigError(
                f"amp picks the precision, but mixed_precision={self.mixed_precision} is given "
                "too; leave one of them out"
            )
        if self.model == "tiny" and (self.revision is not None or self.trust_remote_code):
            name = "revision" if self.revision is not None else "trust_remote_code"
            raise ConfigError(
                f"{name}={getattr(self, name)} has no effect on model=tiny, which is built in; "
                f"give a model, or leave {name} out"
            )
        if self.activation_offload and self.compile:
            raise ConfigError(
                "activation_offload moves what blocks keep, but compile decides what that is; "
                "leave one of them out"
            )
        if self.merge_adapter and not self.use_peft:
            raise ConfigError(
                "merge_adapter merges a LoRA adapter into its base model; give use_peft too"
            )
