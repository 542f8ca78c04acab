"""State: positions, offload, round trips."""

from __future__ import annotations

import copy
from typing import Any

import torch

from accum_trainer import causal_lm_loss
from accum_trainer.engine.own_parts import WholeTensors
from tests.engine.cases.probing import ENGINE, Probe, accumulator, case, compare, planned
from tests.reference import big_batch, equal, make_model, make_rows, pad, relative_error


@case
def position_survives_another_world() -> dict[str, Any]:
    """Stop after two windows, continue from the saved position: the rest of the epoch, then the
    next."""
    rows = make_rows(30)
    acc = accumulator(2, global_batch_size=8)
    probe = Probe(acc, make_model("llama"))
    first = acc.windows(rows, collate_fn=pad)
    for count, window in enumerate(first, start=1):
        for batch in window:
            with acc.accumulate(probe.model):
                acc.backward(causal_lm_loss(probe.model, batch))
        probe.step()
        if count == 2:
            break
    state = copy.deepcopy(first.state_dict())
    second = acc.windows(rows, collate_fn=pad)
    second.load_state_dict(state)
    rest = compare(probe, second, planned(rows, 8)[2:])
    following = compare(probe, second, planned(rows, 8, epoch=1))
    return {"state": state, "errors": rest["errors"] + following["errors"]}


@case
def i22_i26_offload_by_policy() -> dict[str, Any]:
    """ZeRO with optimizer state in host memory, under both policies: the same norms and the same
    exact gradient."""
    if ENGINE.get("zero_stage", 0) not in (1, 2, 3):
        return {"norms": [], "errors": []}
    rows = make_rows(16)
    norms, errors = [], []
    for offload in (False, True):
        for policy in ("once-per-window", "every-microbatch"):
            acc = accumulator(2, global_batch_size=16, cpu_offload=offload, grad_sync=policy)
            model = make_model("llama")
            exact = big_batch(model, rows)[1]
            prepared, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
            for window in acc.windows(rows, collate_fn=pad):
                for batch in window:
                    with acc.accumulate(prepared):
                        acc.backward(causal_lm_loss(prepared, batch))
                errors.append(relative_error(acc.engine.full_gradients(prepared), exact))
                norms.append(acc.step(optimizer).grad_norm)
    return {"norms": norms, "errors": errors}


@case
def parts_of_all_ranks_are_the_whole_state() -> dict[str, Any]:
    """What the ranks would write, put together, against what the engine gathers."""
    acc = accumulator(2, global_batch_size=8)
    model = make_model("llama")
    model.register_buffer("empty", torch.empty(0, 3))
    prepared, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    found = {}
    for when, window in zip(("first", "second"), acc.windows(make_rows(16), collate_fn=pad)):  # noqa: B905
        for batch in window:
            with acc.accumulate(prepared):
                acc.backward(causal_lm_loss(prepared, batch))
        acc.step(optimizer)
        parts = [part.on_host() for part in acc.engine.own_parts(prepared, optimizer.accelerated)]
        gathered = acc.engine.gather_objects(parts)
        whole = WholeTensors(part for own in gathered for part in own)
        full = acc.engine.full_optimizer_state(prepared, optimizer.accelerated)["state"]
        weights = acc.engine.full_weights(prepared, trained_only=True)
        expected = {f"model/{name}": weight for name, weight in weights.items()}
        for name, state in full.items():
            expected |= {f"optimizer/{name}/{k}": torch.as_tensor(v) for k, v in state.items()}
        found[when] = {
            "differing": sorted(whole.keys() ^ expected.keys())
            + [n for n in whole.keys() & expected.keys() if not _same(whole[n], expected[n])],
            "states": len(full),
            "elements": [sum(part.values.numel() for part in own) for own in gathered],
        }
    return found


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float(), b.float())


@case
def state_survives_a_round_trip() -> dict[str, Any]:
    """Three AdamW updates, everything saved and loaded into fresh objects, three more: as six
    without a stop. One parameter has an odd number of elements, which two ranks pad."""
    rows = make_rows(48)
    finals = []
    for stop_after in (6, 3):
        done, saved = 0, None
        while done < 6:
            acc = accumulator(2, global_batch_size=8, max_grad_norm=1.0)
            model = _with_odd_bias(make_model("llama"))
            groups = [
                {"params": [p for p in model.parameters() if (p.ndim > 1) == wide]}
                for wide in (True, False)
            ]
            adam = torch.optim.AdamW(groups, lr=1e-2)
            prepared, optimizer = acc.prepare(model, adam)
            windows = acc.windows(rows, collate_fn=pad)
            if saved is not None:
                acc.engine.load_full_weights(prepared, saved[0])
                acc.engine.load_full_optimizer_state(prepared, optimizer.accelerated, saved[1])
                windows.load_state_dict(saved[2])
            for window in windows:
                for batch in window:
                    with acc.accumulate(prepared):
                        acc.backward(causal_lm_loss(prepared, batch))
                acc.step(optimizer)
                done += 1
                if done in (stop_after, 6):
                    break
            saved = (
                acc.engine.full_weights(prepared, trained_only=True),
                acc.engine.full_optimizer_state(prepared, optimizer.accelerated),
                windows.state_dict(),
            )
        assert saved is not None
        finals.append(saved[0])
    return {
        "equal": equal(*finals),
        "moved": max(
            (finals[0][n] - p).abs().max().item() for n, p in make_model("llama").named_parameters()
        ),
    }


def _with_odd_bias(model: Any) -> Any:
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    assert model.config.vocab_size % 2
    return model
