"""The model card of a saved model: the hub's reader parses it, its code loads the model, and it
tells nothing private."""

from __future__ import annotations

import os
import re

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from accum_trainer.config import TrainConfig
from accum_trainer.lm.model import load_model, load_tokenizer
from accum_trainer.train.model_card import merged_card, model_card
from accum_trainer.train.model_origin import ModelOrigin
from accum_trainer.train.saved_model import save_model
from tests.end_to_end.read_runs import weights_in

ORIGIN = ModelOrigin(updates=1351, num_samples=22_419, checkpoint="")
PLAN = {
    **{"effective_batch_size": 64, "physical_batch_size": 4, "gradient_accumulation_steps": 8},
    **{"world_size": 2, "max_tokens_per_micro_batch": None, "num_samples": 7473, "lr": 2e-5},
    **{"scheduler": "cosine", "warmup_updates": 18, "engine": "zero2", "mixed_precision": "bf16"},
    "versions": {"accum_trainer": "0.1.0", "torch": "2.13.0"},
}
LORA = {"use_peft": True, "lora_r": 8, "lora_alpha": 12.0, "lora_target_modules": "q_proj,v_proj"}


def told(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^\| (\w.*?) \| (.*) \|$", card.text, re.MULTILINE))


def test_an_adapter_of_a_model_from_the_hub():
    config = TrainConfig(
        model="some-org/some-model", revision="v2", dataset="org/rows:main", seed=3, **LORA
    )
    card = ModelCard(model_card(config, PLAN, ORIGIN, is_adapter=True))
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert card.data.base_model == "some-org/some-model" and card.data.datasets == ["org/rows"]
    validate_repo_id(card.data.base_model)
    assert "base_model:adapter:some-org/some-model" in card.data.tags
    assert told(card) == {
        "base model": "`some-org/some-model`, revision v2",
        "data": "`org/rows:main`, 7,473 samples",
        "effective batch": "64 samples per optimizer update "
        "(micro-batch 4, accumulation steps 8, processes 2)",
        "optimizer updates": "1,351, on 22,419 samples",
        "optimizer": "AdamW, peak learning rate 2e-05, cosine, warm-up updates: 18, weight decay 0",
        "engine": "zero2, mixed precision: bf16",
        "LoRA": "rank 8, alpha 12, dropout 0, modules q_proj,v_proj",
        "seed": "3",
        "versions": "accum_trainer 0.1.0, torch 2.13.0",
    }
    assert 'from_pretrained("some-org/some-model", revision="v2")' in card.text


@pytest.mark.parametrize("is_adapter", [True, False])
def test_nothing_private_and_nothing_that_breaks_the_page(tmp_path, monkeypatch, is_adapter):
    folder = tmp_path / "jane's client" / 'a|b`"] hf_abcdefgh12345'
    folder.mkdir(parents=True)
    file = "/home/jane/secret-project/sk-12345678abc.jsonl"
    config = TrainConfig(
        model=str(folder), dataset_file=file, shard="0/2", lora_modules_to_save="x |\n# y", **LORA
    )
    plan = PLAN | {"engine": "<script>|`\n---\n", "versions": {"a\nb": ["|"]}}
    tokens = plan | {"max_tokens_per_micro_batch": 4096, "gradient_accumulation_steps": None}
    for text in (
        model_card(config, tokens, ORIGIN, is_adapter),
        model_card(config, {}, ORIGIN, is_adapter),
        merged_card(config, "concat" if is_adapter else "mean", {"a|b": 3, "c": 4}),
    ):
        card = ModelCard(text)
        assert card.data.base_model is None
        assert card.data.library_name == ("peft" if is_adapter else "transformers")
        hidden = ("jane", "secret", "abcdefgh12345", "sk-1", "<script>", str(tmp_path))
        assert not [part for part in hidden if part in text]
        assert text.count("---\n") == 2 and text.count("\n# ") == 1  # the head's two, the title
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert all(row.count("|") == 3 for row in rows)
        compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "card", "exec")
    assert "up to 4,096 tokens, processes 2" in model_card(config, tokens, ORIGIN, is_adapter)
    monkeypatch.chdir(tmp_path)  # a folder beside is no id of the hub, whatever its name
    os.mkdir("gpt2")
    assert ModelCard(model_card(TrainConfig(model="gpt2"), PLAN, ORIGIN, False)).data == (
        ModelCard(model_card(TrainConfig(), PLAN, ORIGIN, False)).data
    )


def test_its_code_loads_the_model(tmp_path):
    """The adapter on a base model in a folder: what the card merges is model-merged/."""
    tokenizer = load_tokenizer(TrainConfig())
    base, model = (tmp_path / name for name in ("base", "model"))
    load_model(TrainConfig(), tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = TrainConfig(model=str(base), merge_adapter=True, **LORA)
    trained = load_model(config, tokenizer)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_model(tmp_path, config, PLAN, trained, tokenizer, trained.state_dict(), ORIGIN)
    for folder, library in ((model, "peft"), (tmp_path / "model-merged", "transformers")):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == library and "More Information" not in card.text
        code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
        code = code.replace("FOLDER_OF", str(tmp_path)).replace("THIS_FOLDER_OR_ID", str(folder))
        names: dict = {}
        exec(code, names)
        found = names.get("merged", names["model"])
        assert len(names["tokenizer"]) == len(tokenizer)
        for name, tensor in weights_in(tmp_path / "model-merged").items():
            assert torch.equal(found.state_dict()[name], tensor), name
