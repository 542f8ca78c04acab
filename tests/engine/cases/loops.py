"""Loops that exist already: Accelerate's, and its objects."""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any

import torch
from torch.utils.data import DataLoader

from accum_trainer import causal_lm_loss
from tests.engine.cases.probing import (
    Probe,
    accumulator,
    case,
    case_of_accelerate,
    compare,
    planned,
    world_size,
)
from tests.reference import make_model, make_rows, pad, relative_error


@case_of_accelerate
def own_accelerator_with_k() -> dict[str, Any]:
    """The user's Accelerator divides by its own K as well; the weights cancel it, in tails too."""
    from accelerate import Accelerator

    rows = make_rows(37)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4 // world_size())
    acc = accumulator(3, accelerator=accelerator)
    probe = Probe(acc, make_model("llama"))
    return compare(probe, acc.windows(rows, collate_fn=pad), planned(rows, 12)) | {
        "k": acc.plan.gradient_accumulation_steps
    }


@case
def optimizer_steps_inside_accumulate() -> dict[str, Any]:
    """As Accelerate's examples do, also when gradients are reduced after the last backward."""
    rows, weights = make_rows(21), []
    for recover, inside in (("auto", False), ("auto", True), ("always", True)):
        acc = accumulator(2, global_batch_size=8, recover_from_oom=recover)
        probe = Probe(acc, make_model("llama"))
        for batch in acc.batches(rows, collate_fn=pad):
            with acc.accumulate(probe.model):
                acc.backward(causal_lm_loss(probe.model, batch))
                if inside:
                    probe.optimizer.step()
                    probe.optimizer.zero_grad()
            if not inside:
                probe.optimizer.step()
                probe.optimizer.zero_grad()
        weights.append(probe.weights())
        assert acc.num_updates == 3
    after, *inside_weights = weights
    return {"errors": [relative_error(found, after) for found in inside_weights]}


@case
def a_window_starts_from_no_gradient() -> dict[str, Any]:
    """After one that a loop left, by a break or an error, and after a backward between two."""
    rows, errors = make_rows(16), {}
    for policy in ("once-per-window", "every-microbatch"):
        for left_by in ("break", "error", "nothing"):
            acc = accumulator(2, global_batch_size=8, grad_sync=policy)
            probe = Probe(acc, make_model("llama"))
            windows = acc.windows(rows, collate_fn=pad)
            with contextlib.suppress(KeyError):
                for batch in itertools.chain.from_iterable(windows):
                    if left_by == "nothing":
                        break
                    with acc.accumulate(probe.model):
                        acc.backward(causal_lm_loss(probe.model, batch))
                        if left_by == "error":
                            raise KeyError
                    break
            if left_by == "nothing":
                ids = torch.arange(6)[None].to(acc.device)
                with contextlib.suppress(RuntimeError):  # ZeRO-0 takes no backward but its own
                    probe.model(input_ids=ids).logits.sum().backward()
            found = []
            for window, whole in zip(windows, planned(rows, 8, epoch=1), strict=True):
                exact = probe.exact(whole)[1]
                for batch in window:
                    with acc.accumulate(probe.model):
                        acc.backward(causal_lm_loss(probe.model, batch))
                probe.step()
                found.append(relative_error(probe.stepped[-1], exact))
            errors[f"{policy}, {left_by}"] = found
    return {"errors": errors}


@case_of_accelerate
def two_players_take_turns() -> dict[str, Any]:
    """A GAN: the generator's loss goes through the discriminator, which may be frozen meanwhile."""
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    errors = {}
    for first in (0, 1):
        for freezes in (True, False):
            torch.manual_seed(0)
            players = [torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)]
            exact = [copy.deepcopy(player).double() for player in players]
            sgds = [torch.optim.SGD(player.parameters(), lr=0.1) for player in players]
            by_hand = [torch.optim.SGD(player.parameters(), lr=0.1) for player in exact]
            acc = accumulator(2, global_batch_size=8)
            *ready, generator, critic = acc.prepare(*sgds, *players)
            windows = acc.windows(DataLoader(x, batch_size=2), count_targets=len)
            for number, window in enumerate(windows, start=first):
                turn = number % 2
                critic.requires_grad_(turn == 1 or not freezes)
                for batch in window:
                    with acc.accumulate((generator, critic)[turn]):
                        loss = _players_loss(turn, generator, critic, batch)
                        acc.backward(loss, reduction="sum")
                acc.step(ready[turn])
            for number, batch in enumerate(x.double().split(8), start=first):
                for player in exact:
                    player.zero_grad()
                (_players_loss(number % 2, *exact, batch) / 8).backward()
                by_hand[number % 2].step()
            weights = {str(i): p.weight for i, p in enumerate(players)}
            truth = {str(i): p.weight for i, p in enumerate(exact)}
            errors[f"{first} first, freezes {freezes}"] = relative_error(weights, truth)
    return {"errors": errors}


def _players_loss(
    turn: int, generator: torch.nn.Module, critic: torch.nn.Module, batch: torch.Tensor
) -> torch.Tensor:
    if turn == 0:
        return -critic(generator(batch)).tanh().sum()
    made = generator(batch).detach()
    judged = critic(torch.cat([made, batch])).tanh()  # one forward, as DDP wants
    return judged[: len(made)].sum() - judged[len(made) :].sum()


@case_of_accelerate
def loop_of_accelerate_gives_the_same_weights() -> dict[str, Any]:
    """The windows loop, the micro-batch loop, and the micro-batch loop with everything prepared by
    accelerate."""
    from accelerate import Accelerator

    rows = make_rows(35)
    final = []
    for style in ("windows", "batches", "accelerate"):
        accelerator = Accelerator(cpu=True)
        acc = accumulator(3, global_batch_size=12, accelerator=accelerator)
        model = make_model("llama")
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(rows, batch_size=3, collate_fn=pad)
        prepare = accelerator.prepare if style == "accelerate" else acc.prepare
        prepared, optimizer = prepare(model, sgd)
        if style == "windows":
            for window in acc.windows(loader):
                for batch in window:
                    with acc.accumulate(prepared):
                        acc.backward(prepared(**batch).loss, reduction="mean")
                acc.step(optimizer)
        else:
            for batch in acc.batches(loader):
                with acc.accumulate(prepared):
                    acc.backward(prepared(**batch).loss, reduction="mean")
                optimizer.step()
                optimizer.zero_grad()
        final.append({name: p.detach().clone() for name, p in model.named_parameters()})
    reference = {name: p.double() for name, p in final[0].items()}
    start = {n: p.double() for n, p in make_model("llama").named_parameters()}
    return {
        "moved": relative_error(start, reference),
        "errors": [relative_error(weights, reference) for weights in final[1:]],
    }


@case_of_accelerate
def loader_sharded_by_accelerate_is_taken_as_it_is() -> dict[str, Any]:
    from accelerate import Accelerator

    rows = make_rows(24)
    accelerator = Accelerator(cpu=True)
    acc = accumulator(3, global_batch_size=12, accelerator=accelerator)
    loader = accelerator.prepare(DataLoader(rows, batch_size=3, collate_fn=pad))
    probe = Probe(acc, make_model("llama"))
    return compare(probe, acc.windows(loader), [rows[:12], rows[12:]])
