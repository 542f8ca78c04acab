"""The engines' contract on this device: tests/engine, with its own assertions, some of its cases.

Each engine is one run of pytest, so a case that fails is named and its assertion shown. The worst
error is read from what the cases returned: relative, of float32 gradients and losses against one
float64 big batch.
"""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.part import Result, Setting, Table, last_words

# Without those that build an Accelerator for the CPU, count what one engine exchanges, or take
# minutes.
CASES = (
    *(
        "planned_llama",
        "planned_gpt2",
        "planned_lora",
        "planned_every_microbatch",
        "planned_checkpointing",
    ),
    *(
        "planned_with_workers",
        "loader_llama_own_mean",
        "loader_lora_own_mean",
        "loader_gpt2_sum",
        "stream_unsized",
    ),
    *(
        "i2_three_against_three_hundred",
        "i3_kwargs_model_has_one_norm",
        "i5_splits_log_the_same_loss",
    ),
    *("i6_packed_samples", "i10_no_target_anywhere", "i13_tail_window_is_the_mean_of_its_own"),
    *(
        "i14_gradients_empty_at_every_window",
        "i17_odd_counts_every_sample_once",
        "i17_rank_without_a_sample",
    ),
    *("i19_constant_gradient_is_one", "i21_order_of_micro_batches_does_not_matter"),
    *("i27_i28_parameters_that_some_micro_batches_use", "i30_gradients_accumulate_in_float32"),
    *(
        "i31_one_clip_of_the_averaged_gradient",
        "i32_lr_knows_updates_only",
        "i33_inf_is_dropped_everywhere",
    ),
    *(
        "masked_prompt_of_first_label_is_not_counted",
        "logits_at_targets_in_chunks",
        "position_survives_another_world",
    ),
    *("bf16_is_as_near_as_one_big_bf16_batch", "every_cut_gives_the_same_gradient", "combinations"),
)
SHARDED = (
    *(
        "planned_llama",
        "planned_lora",
        "loader_llama_own_mean",
        "stream_unsized",
        "i10_no_target_anywhere",
    ),
    *(
        "i13_tail_window_is_the_mean_of_its_own",
        "i19_constant_gradient_is_one",
        "i30_gradients_accumulate_in_float32",
    ),
    *(
        "i31_one_clip_of_the_averaged_gradient",
        "i33_inf_is_dropped_everywhere",
        "state_survives_a_round_trip",
    ),
    "bf16_is_as_near_as_one_big_bf16_batch",
)
SMALL = (
    "planned_llama",
    "i2_three_against_three_hundred",
    "i13_tail_window_is_the_mean_of_its_own",
)
# Seconds for one engine: one that hangs must not take the others with it.
LIMIT = 140.0
# In the folder of an engine.
REPORT, MADE, LOG = "junit.xml", "made", "pytest.txt"
HEADER = [
    "engine",
    "processes",
    "over",
    "cases",
    "assertions passed",
    "failed",
    "worst error against float64",
]


def contract(setting: Setting) -> Result:
    """One process; two processes on one device over gloo; one process under torchrun, over NCCL on
    a GPU."""
    own = "gloo" if setting.cpu else "nccl"
    engines = {"single": ("single", 1, None), "two on one device": ("ddp", 2, "gloo")}
    engines |= {} if setting.small else {"one under torchrun": ("single", 1, own)}
    return _all(setting, SMALL if setting.small else CASES, engines)


def sharded(setting: Setting) -> Result:
    """ZeRO and FSDP2 with one process, FSDP2's under torchrun; on a CPU also FSDP2 with two."""
    small = ["zero2"] if setting.small else ["zero1", "zero2", "zero3"]
    engines: dict[str, tuple[str, int, str | None]] = {name: (name, 1, None) for name in small}
    over = "gloo" if setting.cpu else "nccl"
    engines["fsdp2"] = ("fsdp2", 1, over)
    if not setting.small:
        engines["fsdp2, offloaded"] = ("fsdp2-offload", 1, over)
    if setting.cpu:
        engines["fsdp2, two processes"] = ("fsdp2", 2, "gloo")
    result = _all(setting, SMALL if setting.small else SHARDED, engines)
    if not setting.cpu:
        result.notes.append(
            "FSDP2 with two processes needs two GPUs: NCCL takes one process per GPU, and over "
            "gloo torch 2.11 crashes in DTensor's all-gather on a GPU (SIGSEGV)."
        )
    result.notes.append(f"FSDP2 with one process and no launcher: {_refusal(setting)}")
    return result


def _all(
    setting: Setting, cases: tuple[str, ...], engines: dict[str, tuple[str, int, str | None]]
) -> Result:
    result = Result(Table(HEADER, []))
    result.notes.append(f"Cases: {', '.join(cases)}.")
    waiting = []
    for title, (engine, count, backend) in engines.items():
        options: dict[str, Any] = {"cpu": setting.cpu}
        options |= {"zero_stage": int(engine[-1])} if engine.startswith("zero") else {}
        options |= {"fsdp": True} if engine.startswith("fsdp2") else {}
        options |= {"cpu_offload": True} if engine == "fsdp2-offload" else {}
        options |= {"backend": backend} if backend else {}
        under_torchrun = backend is not None
        asked = {"engine": engine, "processes": count, "options": options}
        asked |= {"cases": cases, "torchrun": under_torchrun}
        waiting.append((title, asked, setting.place(title.replace(" ", "-"))))
    # The models are tiny: a GPU holds them all, a CPU is full with one.
    with ThreadPoolExecutor(1 if setting.cpu else len(waiting)) as pool:
        limit = LIMIT * setting.patience
        for ended in pool.map(lambda one: (one, _run(*one[1:], limit)), waiting):
            (title, asked, folder), how = ended
            _read(result, title, asked, folder, how)
    return result


def _run(asked: dict[str, Any], folder: Path, limit: float) -> str:
    """Run one engine's cases, their report in the folder; how that ended."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/engine/test_contract.py",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    command += [
        "-p",
        "no:xdist",
        "--basetemp",
        str(folder / MADE),
        "--junitxml",
        str(folder / REPORT),
    ]
    environment = os.environ | {"ACCUM_TRAINER_CONTRACT": json.dumps(asked)}
    status = processes.run(command, folder / LOG, limit, environment)
    return processes.how_it_ended(status, limit)


def _read(result: Result, title: str, asked: dict[str, Any], folder: Path, ended: str) -> None:
    """The row and the checks of one engine."""
    said = last_words((folder / LOG).read_text(errors="replace"))
    passed, failed = verdicts(folder / REPORT)
    returned = [json.loads(path.read_text()) for path in (folder / MADE).rglob("rank*.json")]
    worst = max((error for found in returned for error in errors_of(found)), default=None)
    ran = sorted({name for found in returned for name in found})
    shown = "none" if worst is None else worst
    over = asked["options"].get("backend", "-")
    result.table.rows.append(
        [title, asked["processes"], over, len(ran), passed, len(failed), shown]
    )
    for words in dict.fromkeys(failed.values()):  # a process that died fails every one of them
        result.check(
            f"{title}: {', '.join(n for n, w in failed.items() if w == words)}", False, words
        )
    complete = passed > 0 and not failed and set(ran) == set(asked["cases"])
    words = f"{passed} assertions of {len(ran)} cases passed" if passed else f"{ended}: {said}"
    result.check(title, complete, words)


def verdicts(report: Path) -> tuple[int, dict[str, str]]:
    """Of pytest's report: how many tests passed, and the last words of those that did not, by
    name."""
    if not report.exists():
        return 0, {}
    passed, failed = 0, {}
    for test in ET.parse(report).iter("testcase"):
        bad = [e for e in test if e.tag in ("failure", "error")]
        if bad:
            failed[test.get("name", "?")] = last_words(bad[0].text or bad[0].get("message", ""), 6)
        elif test.find("skipped") is None:
            passed += 1
    return passed, failed


def errors_of(found: Any, name: str = "") -> Iterator[float]:
    """Every number below a key that holds errors of float32."""
    if isinstance(found, dict):
        for key, value in found.items():
            inside = name or (key if key in ("errors", "loss_errors", "errors_by_kind") else "")
            if not str(key).endswith("bf16"):
                yield from errors_of(value, inside)
    elif isinstance(found, list):
        for value in found:
            yield from errors_of(value, name)
    elif name and isinstance(found, float):
        yield found


def _refusal(setting: Setting) -> str:
    from accum_trainer import Accumulator, EngineError

    try:
        Accumulator(micro_batch_size=1, fsdp=True, cpu=setting.cpu)
    except EngineError as error:
        return str(error)
    return "not refused"
