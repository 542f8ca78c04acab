"""Tiny models of many families, with ragged rows for each: what `families.py` and its test train.

A family is a model built from its configuration, rows with what its own loss needs, and a collate
function. Nothing here knows how targets are counted: the model's own loss over one big batch in
float64 is the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers as hf

from benchmarks.families_rows import (
    CLASSES,
    IGNORE,
    IMAGE,
    IMAGE_TOKEN,
    VOCABULARY,
    Collate,
    Rows,
    answer_rows,
    causal_rows,
    choice_rows,
    labelled_rows,
    map_of_classes,
    masked_rows,
    pad,
    pad_with_types,
    patches,
    picture_chats,
    pictures,
    seq2seq_rows,
    sounds,
    spoken_rows,
    tagged_rows,
)


@dataclass(frozen=True)
class Family:
    """A kind of model that people train.

    Attributes:
        name: of the architecture.
        kind: of the task, as the table groups them.
        build: a fresh model in float32, the same weights each time.
        rows: so many samples, ragged, the same each time.
        collate: samples to a batch.
        shifts: the model's own loss predicts the next token, so `causal_lm_loss` is its sum.
    """

    name: str
    kind: str
    build: Callable[[], torch.nn.Module]
    rows: Rows
    collate: Collate
    shifts: bool = False


# --- models ---

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    **_SIZES,
    **_TOKENS,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    **_TOKENS,
}
_EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
}
_BERT = {**_SIZES, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
_BART = {
    **_TOKENS,
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_VIT = {
    "image_size": IMAGE,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_SOUND = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "layerdrop": 0.0,
    "pad_token_id": 0,
}


def _built(model: str, config: str, **options: Any) -> Callable[[], torch.nn.Module]:
    """A model of transformers by the names of its class and of its configuration's."""

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        made = getattr(hf, config)(**options)
        made._experts_implementation = "eager"  # the grouped product knows no float64  # noqa: SLF001 - transformers has no public name
        return getattr(hf, model)(made).float()

    return build


def _causal(name: str, prefix: str, **options: Any) -> Family:
    model = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    config = f"{prefix}TextConfig" if hasattr(hf, f"{prefix}TextConfig") else f"{prefix}Config"
    return Family(name, "causal", _built(model, config, **options), causal_rows, pad, True)


def _of(
    name: str, kind: str, rows: Any, model: str, config: str, collate: Collate = pad, **options: Any
) -> Family:
    return Family(name, kind, _built(model, config, **options), rows, collate)


def _lora() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    base = _built("LlamaForCausalLM", "LlamaConfig", **_LLAMA)()
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():  # B starts at zero, which would make every gradient of A zero
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def _lora_t5() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    base = _built("T5ForConditionalGeneration", "T5Config", **_T5)()
    return get_peft_model(
        base, LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    )


def _llava() -> torch.nn.Module:
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(**_VIT)
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(**_LLAMA),
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return hf.LlavaForConditionalGeneration(config).float()


def _paligemma() -> torch.nn.Module:
    torch.manual_seed(0)
    text = {**_LLAMA, "head_dim": 8, "model_type": "gemma"}
    config = hf.PaliGemmaConfig(
        vision_config={**_VIT, "model_type": "siglip_vision_model", "projection_dim": 32},
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
    )
    return hf.PaliGemmaForConditionalGeneration(config).float()


def _qwen2_vl() -> torch.nn.Module:
    torch.manual_seed(0)
    text = {
        **_LLAMA,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }
    vision = {
        "depth": 1,
        "embed_dim": 32,
        "num_heads": 4,
        "hidden_size": 32,
        "patch_size": 4,
        "in_channels": 3,
        "mlp_ratio": 1,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    return hf.Qwen2VLForConditionalGeneration(config).float()


def _families() -> list[Family]:
    multiple = labelled_rows(lambda rng: rng.randint(0, CLASSES))
    regression = labelled_rows(lambda rng: np.float32(rng.randn()))
    columns = labelled_rows(lambda rng: rng.randint(0, CLASSES, 1))
    several = labelled_rows(lambda rng: (rng.rand(CLASSES) < 0.4).astype("float32"))
    transcripts = sounds(
        lambda rng: np.pad(rng.randint(1, VOCABULARY, 6), (0, 2), constant_values=IGNORE)
    )
    experts = {**_LLAMA, **_EXPERTS}
    return [
        _causal("Llama", "Llama", **_LLAMA),
        Family("Llama, LoRA", "causal", _lora, causal_rows, pad, True),
        _causal("GPT-2", "GPT2", **_GPT),
        _causal("GPT-J", "GPTJ", rotary_dim=4, **_GPT),
        _causal(
            "GPT-Neo",
            "GPTNeo",
            **{
                **_LLAMA,
                "num_layers": 2,
                "num_heads": 4,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 4,
            },
        ),
        _causal("GPT-NeoX", "GPTNeoX", **_LLAMA),
        _causal("OPT", "OPT", word_embed_proj_dim=32, ffn_dim=48, **_LLAMA),
        _causal("Bloom", "Bloom", n_layer=2, n_head=4, hidden_size=32, vocab_size=VOCABULARY),
        _causal("Falcon", "Falcon", **_LLAMA),
        _causal(
            "MPT", "Mpt", d_model=32, n_heads=4, n_layers=2, vocab_size=VOCABULARY, max_seq_len=64
        ),
        _causal("Qwen2", "Qwen2", **_LLAMA),
        _causal("Qwen3", "Qwen3", head_dim=8, **_LLAMA),
        _causal("Mistral, window 4", "Mistral", sliding_window=4, **_LLAMA),
        _causal(
            "Gemma-2", "Gemma2", head_dim=8, sliding_window=30, query_pre_attn_scalar=8, **_LLAMA
        ),
        _causal(
            "Gemma-3", "Gemma3", head_dim=8, sliding_window=4, query_pre_attn_scalar=8, **_LLAMA
        ),
        _causal("Phi-3", "Phi3", **_LLAMA),
        _causal("OLMo-2", "Olmo2", **_LLAMA),
        _causal("Cohere", "Cohere", **_LLAMA),
        _causal("StableLM", "StableLm", **_LLAMA),
        _causal(
            "StarCoder-2",
            "Starcoder2",
            **{**_LLAMA, "residual_dropout": 0.0, "embedding_dropout": 0.0},
        ),
        _causal("Granite", "Granite", **_LLAMA),
        _causal(
            "Mamba",
            "Mamba",
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
        ),
        _causal(
            "Mamba-2",
            "Mamba2",
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=1,
            chunk_size=8,
        ),
        _causal(
            "RecurrentGemma",
            "RecurrentGemma",
            **{**_LLAMA, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4},
        ),
        _causal(
            "LFM2",
            "Lfm2",
            **{
                **_LLAMA,
                "layer_types": ["conv", "full_attention"],
                "block_ff_dim": 48,
                "block_auto_adjust_ff_dim": False,
            },
        ),
        _causal("Mixtral, router", "Mixtral", **experts),
        _causal(
            "Qwen2-MoE, router",
            "Qwen2Moe",
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            **experts,
        ),
        _causal("OLMoE, router", "Olmoe", **experts),
        _causal("gpt-oss, router", "GptOss", head_dim=8, sliding_window=4, **experts),
        _of("T5", "encoder-decoder", seq2seq_rows, "T5ForConditionalGeneration", "T5Config", **_T5),
        Family("T5, LoRA", "encoder-decoder", _lora_t5, seq2seq_rows, pad),
        _of(
            "BART",
            "encoder-decoder",
            seq2seq_rows,
            "BartForConditionalGeneration",
            "BartConfig",
            **_BART,
        ),
        _of(
            "mBART",
            "encoder-decoder",
            seq2seq_rows,
            "MBartForConditionalGeneration",
            "MBartConfig",
            **_BART,
        ),
        _of(
            "Pegasus",
            "encoder-decoder",
            seq2seq_rows,
            "PegasusForConditionalGeneration",
            "PegasusConfig",
            **_BART,
        ),
        _of("Marian", "encoder-decoder", seq2seq_rows, "MarianMTModel", "MarianConfig", **_BART),
        _of(
            "Switch, router",
            "encoder-decoder",
            seq2seq_rows,
            "SwitchTransformersForConditionalGeneration",
            "SwitchTransformersConfig",
            **{
                **_T5,
                "num_experts": 4,
                "num_sparse_encoder_layers": 1,
                "num_sparse_decoder_layers": 1,
                "expert_capacity": 64,
                "router_jitter_noise": 0.0,
                "output_router_logits": True,
            },
        ),
        _of("BERT", "masked", masked_rows, "BertForMaskedLM", "BertConfig", **_BERT),
        _of("RoBERTa", "masked", masked_rows, "RobertaForMaskedLM", "RobertaConfig", **_BERT),
        _of(
            "ALBERT",
            "masked",
            masked_rows,
            "AlbertForMaskedLM",
            "AlbertConfig",
            embedding_size=16,
            **_BERT,
        ),
        _of(
            "ELECTRA",
            "masked",
            masked_rows,
            "ElectraForMaskedLM",
            "ElectraConfig",
            embedding_size=16,
            **_BERT,
        ),
        _of(
            "DistilBERT",
            "masked",
            masked_rows,
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            dim=32,
            n_layers=1,
            n_heads=4,
            hidden_dim=48,
            vocab_size=VOCABULARY,
        ),
        _of(
            "ModernBERT",
            "masked",
            masked_rows,
            "ModernBertForMaskedLM",
            "ModernBertConfig",
            **{**_BERT, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        ),
        _of(
            "DeBERTa-v2", "masked", masked_rows, "DebertaV2ForMaskedLM", "DebertaV2Config", **_BERT
        ),
        _of(
            "BERT",
            "token classes",
            tagged_rows,
            "BertForTokenClassification",
            "BertConfig",
            num_labels=CLASSES,
            **_BERT,
        ),
        _of(
            "RoBERTa",
            "token classes",
            tagged_rows,
            "RobertaForTokenClassification",
            "RobertaConfig",
            num_labels=CLASSES,
            **_BERT,
        ),
        _of(
            "Llama",
            "token classes",
            tagged_rows,
            "LlamaForTokenClassification",
            "LlamaConfig",
            num_labels=CLASSES,
            **_LLAMA,
        ),
        _of(
            "BERT",
            "one class",
            multiple,
            "BertForSequenceClassification",
            "BertConfig",
            num_labels=CLASSES,
            **_BERT,
        ),
        _of(
            "BERT, labels (B, 1)",
            "one class",
            columns,
            "BertForSequenceClassification",
            "BertConfig",
            num_labels=CLASSES,
            problem_type="single_label_classification",
            **_BERT,
        ),
        _of(
            "Llama",
            "one class",
            multiple,
            "LlamaForSequenceClassification",
            "LlamaConfig",
            num_labels=CLASSES,
            **_LLAMA,
        ),
        _of(
            "GPT-2",
            "one class",
            multiple,
            "GPT2ForSequenceClassification",
            "GPT2Config",
            num_labels=CLASSES,
            **_GPT,
        ),
        _of(
            "BERT",
            "regression",
            regression,
            "BertForSequenceClassification",
            "BertConfig",
            num_labels=1,
            **_BERT,
        ),
        _of(
            "BERT",
            "several classes",
            several,
            "BertForSequenceClassification",
            "BertConfig",
            num_labels=CLASSES,
            problem_type="multi_label_classification",
            **_BERT,
        ),
        _of("BERT", "choice", choice_rows, "BertForMultipleChoice", "BertConfig", **_BERT),
        _of("BERT", "answers", answer_rows, "BertForQuestionAnswering", "BertConfig", **_BERT),
        _of(
            "ModernBERT",
            "answers",
            answer_rows,
            "ModernBertForQuestionAnswering",
            "ModernBertConfig",
            **{**_BERT, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        ),
        _of(
            "ViT",
            "pictures",
            pictures(lambda rng: rng.randint(0, CLASSES)),
            "ViTForImageClassification",
            "ViTConfig",
            num_labels=CLASSES,
            **_VIT,
        ),
        _of(
            "DeiT",
            "pictures",
            pictures(lambda rng: rng.randint(0, CLASSES)),
            "DeiTForImageClassification",
            "DeiTConfig",
            num_labels=CLASSES,
            **_VIT,
        ),
        _of(
            "ConvNeXt",
            "pictures",
            pictures(lambda rng: rng.randint(0, CLASSES)),
            "ConvNextForImageClassification",
            "ConvNextConfig",
            num_labels=CLASSES,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_stages=2,
            drop_path_rate=0.0,
        ),
        _of(
            "ResNet",
            "pictures",
            pictures(lambda rng: rng.randint(0, CLASSES)),
            "ResNetForImageClassification",
            "ResNetConfig",
            num_labels=CLASSES,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
        ),
        _of(
            "Segformer",
            "segmentation",
            pictures(map_of_classes),
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_labels=CLASSES,
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
        ),
        _of(
            "Segformer, frozen norm",
            "segmentation",
            pictures(map_of_classes),
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_labels=CLASSES,
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
        ),
        _of(
            "wav2vec2",
            "speech",
            transcripts,
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            ctc_zero_infinity=False,
            **_SOUND,
        ),
        _of(
            "wav2vec2, CTC mean",
            "speech",
            transcripts,
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            ctc_loss_reduction="mean",
            **_SOUND,
        ),
        _of(
            "HuBERT, CTC mean",
            "speech",
            transcripts,
            "HubertForCTC",
            "HubertConfig",
            ctc_loss_reduction="mean",
            **_SOUND,
        ),
        _of(
            "wav2vec2",
            "sounds",
            sounds(lambda rng: rng.randint(0, CLASSES)),
            "Wav2Vec2ForSequenceClassification",
            "Wav2Vec2Config",
            num_labels=CLASSES,
            classifier_proj_size=16,
            **_SOUND,
        ),
        _of(
            "Whisper",
            "speech",
            spoken_rows,
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=32,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **_BART,
        ),
        Family("LLaVA", "pictures and text", _llava, picture_chats(16), pad, True),
        Family(
            "PaliGemma", "pictures and text", _paligemma, picture_chats(16), pad_with_types, True
        ),
        Family("Qwen2-VL", "pictures and text", _qwen2_vl, picture_chats(4), patches, True),
    ]


FAMILIES = _families()
