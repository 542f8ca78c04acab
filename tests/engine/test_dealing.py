"""FSDP2 deals the weights that process 0 alone has loaded: nothing changes but memory."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.gpu.models import llama
from benchmarks.loading import measure
from tests.launching import torchrun


def test_dealt_weights_are_those_that_every_process_would_have_loaded():
    """And three updates later too, to the bit: plain, tied and LoRA."""
    done = torchrun(3, "tests.engine.dealing")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    for kind, found in result["found"].items():
        assert found == dict.fromkeys(("begun", "buffers", "ended", "loaded"), True), kind
    wrong_place, another = result["said"]
    assert "process 0, which has to load its weights for all" in wrong_place
    assert "the model of process 1 is another than that of process 0: (" in another


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.long
def test_a_machine_holds_the_model_once_while_it_is_loaded(tmp_path):
    """A file in bf16, so that reading it makes a copy in float32: 238 MB, in two processes."""
    model = llama("60M", vocab_size=4096)  # no fewer than the tokenizer has
    size = sum(p.numel() * 4 for p in model.parameters())
    model.bfloat16().save_pretrained(tmp_path)
    by_all, by_one = (measure(tmp_path, 2, "fsdp2", deals) for deals in (False, True))
    assert by_one < 1.7 * size < 2.5 * size < by_all
