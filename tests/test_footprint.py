"""Memory and traffic that `plan` predicts, by hand on a small model, and what it says of them."""

from __future__ import annotations

import dataclasses
import resource

import pytest

from accum_trainer import BatchPlan, ConfigError, TrainConfig
from accum_trainer.cli import main
from accum_trainer.plan.footprint import RESERVED, Footprint, footprints, recommend
from accum_trainer.plan.job import DeepSpeedSizes
from accum_trainer.plan.memory_report import memory_report
from accum_trainer.plan.shapes import model_shapes, trace

ONCE, EVERY = "once-per-window", "every-microbatch"
# The built-in model: V h + L (4 h^2 + 3 h i + 2 h) + h, its output head tied to the embedding.
V, H, INNER, L, HEADS = 4096, 128, 352, 4, 4
TINY = V * H + L * (4 * H * H + 3 * H * INNER + 2 * H) + H


def rows(
    config: TrainConfig,
    k: int = 2,
    w: int = 1,
    sizes: DeepSpeedSizes | None = None,
    weights: str = EVERY,
) -> dict:
    """By engine and `grad_sync`; of engines that shard weights, those with `weights`."""
    found = footprints(config, BatchPlan(config.batch_size, k, w), sizes)
    return {
        (row.engine, row.grad_sync): row for row in found.rows if row.weight_sync in (None, weights)
    }


# --- by hand ---


def test_parameters_by_hand():
    shapes = model_shapes(TrainConfig())
    assert (shapes.parameters, shapes.trained) == (TINY, TINY)
    assert shapes.largest == shapes.widest == V * H
    assert shapes.block == 4 * H * H + 3 * H * INNER + 2 * H
    assert shapes.outside == V * H + H
    assert (shapes.layers, shapes.hidden_size, shapes.vocabulary) == (L, H, V)


def test_adapters_by_hand():
    shapes = model_shapes(
        TrainConfig(use_peft=True, lora_r=8, lora_target_modules="q_proj,down_proj")
    )
    assert shapes.trained == L * 8 * ((H + H) + (INNER + H))
    assert shapes.parameters == TINY + shapes.trained


def by_hand(kept_by_layers: int, t: int) -> int:
    """Numbers: what the layers keep, the last norm's three of t x h, and at the head, for t - 1
    targets: hidden states and their gradient, the gradient of the head's weight, logits and their
    logarithms."""
    return kept_by_layers + 3 * t * H + 2 * (t - 1) * H + V * H + 2 * (t - 1) * V


def test_activations_by_hand():
    """One sample of t tokens in float32 keeps, per layer, ten of t x h (two norms' input, normed
    and scaled, q, k, v and the attention's output), four of t x i (gate, its activation, up, their
    product), and a few numbers per token."""
    t = 256
    per_layer = 10 * t * H + 4 * t * INNER + t * HEADS + 2 * t
    found = trace(TrainConfig(max_seq_len=t), 1, "float32").peak()
    assert found == pytest.approx(4 * by_hand(L * per_layer, t), rel=0.01)


def test_a_tied_embedding_has_two_gradients_and_their_sum():
    """With few tokens that is the peak: the output head's part waits for the embedding's."""
    assert trace(TrainConfig(max_seq_len=16), 1, "float32").peak() == pytest.approx(
        3 * 4 * V * H, rel=0.001
    )


def test_a_mask_is_kept_by_every_layer_and_one_sample_needs_none():
    t = 256
    one, two = (trace(TrainConfig(max_seq_len=t), b, "float32").peak() for b in (1, 2))
    of_the_heads_weight = 4 * V * H  # does not double with B
    assert two + of_the_heads_weight - 2 * one == pytest.approx(4 * L * 2 * t * t, rel=0.1)


def test_checkpointing_keeps_the_layers_inputs():
    t = 256
    found = trace(TrainConfig(max_seq_len=t, gradient_checkpointing=True), 1, "float32").peak()
    assert found == pytest.approx(4 * by_hand(L * t * H, t), rel=0.02)


def test_a_token_budget_is_a_micro_batch_of_the_longest_samples():
    config = TrainConfig(max_seq_len=64, max_tokens_per_micro_batch=130, global_batch_size=16)
    found = footprints(config, BatchPlan(world_size=2, global_batch_size=16))
    same = footprints(TrainConfig(max_seq_len=64, batch_size=2), BatchPlan(2, 4, 2))
    assert found.samples == 2 and found.rows == same.rows


def test_dropout_in_attention_costs_its_matrix_on_a_cpu_only(tmp_path):
    from transformers import GPT2Config

    GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=256).save_pretrained(
        tmp_path
    )
    on_gpu, on_cpu = (
        trace(TrainConfig(model=str(tmp_path), max_seq_len=256, cpu=cpu), 1, "float32").peak()
        for cpu in (False, True)
    )
    matrix = 2 * 2 * 256 * 256 * 4
    assert on_cpu - on_gpu > matrix


def test_states_by_hand():
    alone = rows(TrainConfig())["single", ONCE]
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * TINY, 4 * TINY, 8 * TINY)
    assert alone.traffic == {ONCE: 0, EVERY: 0}
    found = rows(TrainConfig(mixed_precision="bf16"), w=4, sizes=DeepSpeedSizes(reduce_bucket=1000))
    quarter = TINY // 4
    assert found["ddp", ONCE].other == 4 * TINY
    zero1 = found["zero1", ONCE]
    assert (zero1.weights, zero1.gradients, zero1.optimizer) == (
        2 * TINY,
        (4 + 2) * TINY,
        12 * quarter,
    )
    assert found["zero2", ONCE].gradients == 4 * TINY
    assert (found["zero2", EVERY].weights, found["zero2", EVERY].gradients) == (
        2 * TINY,
        4 * quarter,
    )
    persistent = model_shapes(TrainConfig()).persistent
    assert persistent == TINY - V * H
    zero3 = found["zero3", EVERY]
    assert (zero3.weights, zero3.optimizer) == (2 * quarter + 2 * persistent, 12 * quarter)
    fsdp2 = found["fsdp2", EVERY]
    assert (fsdp2.weights, fsdp2.gradients, fsdp2.optimizer) == (
        4 * quarter,
        4 * quarter,
        8 * quarter,
    )
    assert found["fsdp2", ONCE].gradients == 4 * TINY
    assert fsdp2.start == 4 * (quarter + V * H + H)  # shards, and the largest that is moved whole


def test_traffic_by_hand():
    k, w = 8, 4
    share = (w - 1) / w
    found = rows(TrainConfig(), k, w)
    n = 4 * TINY
    small, outside = 4 * (TINY - V * H), 4 * (V * H + H)
    expected = {
        "ddp": (2 * n, 2 * k * n),
        "zero1": (3 * n, 3 * n),
        "zero2": (3 * n, (2 * k + 1) * n),
        "zero3": (k * (n - small) + n + small, k * (n - small) + k * n + small),
        "fsdp2": (k * (2 * n - outside) + n, k * (2 * n - outside) + k * n),
    }
    for engine, policies in expected.items():
        row = found[engine, ONCE]
        assert (row.traffic[ONCE], row.traffic[EVERY]) == pytest.approx(
            [share * sent for sent in policies]
        ), engine


def test_groups_by_hand():
    """Two groups of two: shards of half the model, and traffic inside a group as of two processes;
    each process all-reduces its half of the gradient with one other."""
    k, n = 8, 4 * TINY
    found, two = (rows(TrainConfig(**more), k, w) for more, w in (({"shard_size": 2}, 4), ({}, 2)))
    for policy in (ONCE, EVERY):
        groups, alone = found["fsdp2", policy], two["fsdp2", policy]
        assert (groups.weights, groups.optimizer) == (alone.weights, alone.optimizer)
        assert groups.total == alone.total
        for sync in (ONCE, EVERY):
            assert groups.traffic[sync] == pytest.approx(alone.traffic[sync] + n / 2)


def test_whole_weights_by_hand():
    """Kept through the window they are gathered once at any K, and their bytes are there."""
    k, w = 8, 4
    n, outside = 4 * TINY, 4 * (V * H + H)
    sizes = DeepSpeedSizes(live=0)
    found, kept = (rows(TrainConfig(), k, w, sizes, weights) for weights in (EVERY, ONCE))
    for engine in ("zero3", "fsdp2"):
        row = kept[engine, ONCE]
        sent = [(n + n) * (w - 1) / w, (n + k * n) * (w - 1) / w]
        assert [row.traffic[ONCE], row.traffic[EVERY]] == pytest.approx(sent)
        assert row.total > found[engine, ONCE].total
    # Instead of a block and the one that is fetched ahead, all L of them.
    more = kept["fsdp2", EVERY].other - found["fsdp2", EVERY].other
    assert more == (L - 2) * (n - outside) // L
    # A window of one micro-batch has nothing to keep them for, unless asked to.
    sharded = {("zero3", ONCE), ("zero3", EVERY), ("fsdp2", ONCE), ("fsdp2", EVERY)}
    assert not sharded & {*rows(TrainConfig(), 1, w, weights=ONCE)}
    assert sharded <= {*rows(TrainConfig(weight_sync=ONCE), 1, w, weights=ONCE)}


def test_gradients_and_activations_are_not_largest_together_at_k_1():
    one, many = (rows(TrainConfig(max_seq_len=32), k)["single", ONCE] for k in (1, 2))
    assert (
        many.total == many.weights + many.gradients + many.optimizer + many.activations + many.other
    )
    assert one.total < one.weights + one.gradients + one.optimizer + one.activations + one.other
    assert one.activations == many.activations


def test_offload_takes_the_optimizer_off_the_gpu():
    config = TrainConfig(zero_stage="zero2", cpu_offload=True)
    found = rows(config, w=2)
    assert all(found[key].optimizer == 0 for key in found if key[0].startswith("zero"))
    assert found["ddp", ONCE].optimizer == 8 * TINY
    assert set(rows(config)) == {("single", ONCE), ("zero2", ONCE), ("zero2", EVERY)}


def test_fsdp2_offloaded_keeps_no_shard_on_the_gpu():
    """Left are gathered weights, a whole gradient until it is reduced, and a block's shard on its
    way."""
    config = TrainConfig(engine="fsdp2", cpu_offload=True)
    found = rows(config, w=2)
    once, every = found["fsdp2", ONCE], found["fsdp2", EVERY]
    assert (once.weights, once.optimizer, once.gradients) == (0, 0, 4 * TINY)
    assert (every.weights, every.optimizer, every.gradients) == (0, 0, 0)
    on_gpu = rows(dataclasses.replace(config, cpu_offload=False), w=2)["fsdp2", EVERY]
    block = 4 * H * H + 3 * H * INNER + 2 * H
    shards = 4 * TINY // 2 * (1 + 2 + 1)  # weights, moments, gradients
    assert on_gpu.total - every.total == pytest.approx(shards - 4 * block // 2, rel=0.01)


# --- host memory ---


def host(w: int = 1, k: int = 2, **options) -> dict:
    """Engine to its need; a batch of 4 x 512 tokens unless another is given."""
    return footprints(TrainConfig(**options), BatchPlan(4, k, w)).host


def test_who_reads_the_model(tmp_path):
    from transformers import LlamaConfig

    sizes = {"vocab_size": V, "hidden_size": H, "intermediate_size": INNER, "num_hidden_layers": L}
    LlamaConfig(**sizes, tie_word_embeddings=True, num_attention_heads=HEADS).save_pretrained(
        tmp_path
    )
    found = host(w=4, model=str(tmp_path))
    whole = 4 * TINY
    assert [found[name].reading for name in ("ddp", "zero1", "zero2")] == [4 * whole] * 3
    assert found["fsdp2"].reading == whole  # process 0 alone
    assert found["zero3"].reading == 4 * 4 * V * H  # a tensor on each process, the largest
    assert host(model=str(tmp_path))["single"].reading == whole


def test_a_checkpoint_is_a_copy_of_the_trained_state():
    found = host(w=4)
    assert {need.writing for need in found.values()} == {12 * TINY}
    adapters = L * 8 * ((H + H) + (INNER + H))
    lora = host(use_peft=True, lora_r=8, lora_target_modules="q_proj,down_proj")["single"]
    assert lora.writing == 12 * adapters and lora.beside == 0
    assert lora.total == lora.reading == 4 * (TINY + adapters)


def test_what_is_offloaded_lies_in_host_memory():
    zero = host(w=2, k=1, engine="zero2", cpu_offload=True)
    assert zero["ddp"].beside == 0 and zero["zero2"].beside == 16 * TINY
    assert zero["zero3"].beside == 20 * TINY  # and the reduced gradient
    assert host(w=2, k=2, engine="zero2", cpu_offload=True)["zero2"].beside == 20 * TINY
    assert zero["fsdp2"].beside == 16 * TINY  # the same four numbers, unlike ZeRO also frozen ones
    groups = host(w=4, shard_size=2, cpu_offload=True)["fsdp2"]
    assert groups.beside == 2 * 16 * TINY  # each group holds the model
    need = host(w=2, gradient_checkpointing=True, activation_offload=True)["ddp"]
    assert need.beside == 2 * L * 4 * 512 * H * 4
    assert need.total == need.beside + need.writing


def test_fp16_has_no_fsdp2():
    assert "fsdp2" not in {engine for engine, _ in rows(TrainConfig(mixed_precision="fp16"), w=2)}


def test_a_model_that_needs_values_is_unknown_and_said_to_be(tmp_path):
    from transformers import MixtralConfig

    MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    ).save_pretrained(tmp_path)
    config = TrainConfig(model=str(tmp_path), max_seq_len=16)
    lines = memory_report(config, BatchPlan(4, 2, 2), 80)
    text = "\n".join(lines)
    assert "activations, offloaded ones too, are unknown: the model cannot be run without" in text
    assert lines[-1].endswith("nothing, since what the activations need is unknown")
    assert "unknown" in next(line for line in lines if line.startswith("ddp"))


def test_a_large_model_is_sized_without_its_memory(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = rows(TrainConfig(model=str(tmp_path), batch_size=1, max_seq_len=2048), w=8)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 500e6
    assert found["ddp", ONCE].gradients == pytest.approx(4 * 6.74e9, rel=0.01)


# --- the choice ---


def engine(name: str, total: float | None, sent: float) -> Footprint:
    total = None if total is None else int(total * 1e9)
    return Footprint(
        name, ONCE, None, 0, 0, 0, total, 0, total, 0, {ONCE: int(sent), EVERY: int(9 * sent)}
    )


def test_whole_copies_else_the_least_traffic_that_fits_is_recommended():
    found = [
        engine("ddp", 90, 8),
        engine("zero2", 40, 12),
        engine("zero3", 20, 30),
        engine("fsdp2", 19, 12),
    ]
    assert recommend(found, 100e9) is found[0]
    assert recommend(found, 80e9) is found[1]  # the first of equals
    assert recommend(found, 30e9) is found[3]
    assert (
        recommend([engine("zero1", 20, 12), engine("zero3", 10, 8)], 100e9).engine == "zero1"
    )  # gathers no weights
    whole = [engine("zero1", 20, 6), engine("ddp", 30, 8)]
    assert [recommend(whole, size).engine for size in (100e9, 25e9)] == ["ddp", "zero1"]
    assert recommend(found, 10e9) is None
    assert recommend([engine("ddp", None, 8)], 100e9) is None
    assert not engine("ddp", 80 * (1 - RESERVED) + 0.1, 0).fits(80e9)


def test_lines_say_what_fits_and_what_to_change():
    config, plan = TrainConfig(max_seq_len=64), BatchPlan(4, 2, 2)
    lines = memory_report(config, plan, 80)
    assert [line.split()[0] for line in lines if " yes " in line][:2] == ["ddp", "zero1"]
    assert lines[-1].startswith("recommended                 ddp, once-per-window")
    nothing = memory_report(config, plan, 0.001)[-1]
    assert "recommended                 nothing: the least, " in nothing
    for remedy in (
        "--gradient-checkpointing",
        "--batch-size 2 --global-batch-size 16",
        "--use-peft",
        "more than 2 processes",
    ):
        assert remedy in nothing
    [asked] = [
        line
        for line in memory_report(dataclasses.replace(config, engine="zero2"), plan, 0.001)
        if line.startswith("asked for")
    ]
    assert asked.count("does not fit") == 2 and "zero2: " in asked and "every-microb" in asked
    without = "\n".join(memory_report(config, plan, None))
    assert "fits" not in without and "recommended" not in without


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--gpu-memory", "80"],
            "gpu_memory=80 is compared with what a model needs; give --model too",
        ),
        (
            ["--model", "tiny", "--gpu-memory", "much"],
            "gpu_memory=much is not a size; give the memory of one GPU in GB",
        ),
        (["--model", "tiny", "--gpu-memory", "0"], "gpu_memory=0 must be above 0"),
        (["--model", "tiny", "--gpu-memory", "-8GB"], "gpu_memory=-8GB must be above 0"),
        (["--model", "nowhere/none", "--gpu-memory", "80"], "model=nowhere/none cannot be found: "),
        (
            ["--model", "tiny", "--max-seq-len", "4096"],
            "max_seq_len=4096 is more than the 2048 positions of model=tiny",
        ),
        (
            ["--model", "tiny", "--use-peft", "--lora-target-modules", "x"],
            "lora_target_modules=x cannot be adapted",
        ),
    ],
)
def test_wrong_input_is_one_message_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert (
        shown.err.startswith(f"error: {message}")
        and len(shown.err.splitlines()) == 1
        and not shown.out
    )


def test_a_folder_without_a_model_is_one_message(tmp_path):
    with pytest.raises(
        ConfigError, match="cannot be found: .*give a folder that save_pretrained wrote"
    ):
        memory_report(TrainConfig(model=str(tmp_path)), BatchPlan(4), None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "ddp here has weights 4, gradients 4, optimizer 8: the same"),
        (
            {"mixed_precision": "bf16"},
            "weights 6, gradients 4, optimizer 8: float32 weights with 16-bit copies beside them, "
            "and float32 gradients",
        ),
        ({"use_peft": True}, "only trained weights have gradients and optimizer state"),
    ],
    ids=["float32", "bf16", "LoRA"],
)
def test_the_usual_16_bytes_stand_beside_the_table(options, says):
    config = TrainConfig(max_seq_len=64, **options)
    [line] = [
        line
        for line in memory_report(config, BatchPlan(4, 2, 2), None)
        if line.startswith("16 bytes per parameter")
    ]
    assert says in line and "GB before activations and other" in line
