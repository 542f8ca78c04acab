"""Training steps that are right: `verify --loop` must pass them."""

import contextlib
import itertools
from types import SimpleNamespace

import torch
import torch.nn.functional as F


def summed_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )


def num_targets(batches):
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def all_targets(accelerator, batches):
    """N: targets of the window over all processes."""
    mine = torch.tensor([num_targets(batches)], device=accelerator.device)
    return int(accelerator.gather(mine).sum())


def update(accelerator, model, optimizer, scheduler, batches):
    """Accelerate's own idiom with the exact weight: gradient_divisor / N; accelerate divides
    by W and by K."""
    divisor = accelerator.num_processes * accelerator.gradient_accumulation_steps
    total = all_targets(accelerator, batches)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(summed_loss(model, batch) * divisor / total)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def update_clipped(accelerator, model, optimizer, scheduler, batches):
    """The same, clipped once, at the window's end."""
    divisor = accelerator.num_processes * accelerator.gradient_accumulation_steps
    total = all_targets(accelerator, batches)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(summed_loss(model, batch) * divisor / total)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def update_clipped_by_a_hook(accelerator, model, optimizer, scheduler, batches):
    """The clip is a hook of optimizer.step(): what the optimizer steps with is right."""

    def clip(inner, *_):
        torch.nn.utils.clip_grad_norm_(inner.param_groups[0]["params"], 0.3)

    handle = optimizer.optimizer.register_step_pre_hook(clip)
    update_by_hand(accelerator, model, optimizer, scheduler, batches)
    handle.remove()


def update_in_a_closure(accelerator, model, optimizer, scheduler, batches):
    """optimizer.step(closure): the backward runs inside the step."""
    total = all_targets(accelerator, batches)

    def closure():
        for index, batch in enumerate(list(batches)):
            is_last = index == len(batches) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                (summed_loss(model, batch) * accelerator.num_processes / total).backward()

    optimizer.step(closure)
    scheduler.step()
    optimizer.zero_grad()


RATES = itertools.count()


def update_with_its_own_rate(accelerator, model, optimizer, scheduler, batches):
    """A warm-up that the loop sets itself, from 0; the scheduler is not used."""
    for group in optimizer.param_groups:
        group["lr"] = 0.02 * next(RATES)
    update_by_hand(accelerator, model, optimizer, SimpleNamespace(step=lambda: None), batches)


def update_by_hand(accelerator, model, optimizer, scheduler, batches):
    """Without accumulate(): no_sync until the last micro-batch, plain backward, zero_grad at the
    start."""
    optimizer.zero_grad()
    total = all_targets(accelerator, batches)
    for index in range(len(batches)):
        loss = accelerator.num_processes / total
        if index < len(batches) - 1:
            with accelerator.no_sync(model):
                (loss * summed_loss(model, batches[index])).backward()
        else:
            (loss * summed_loss(model, batches[index])).backward()
    optimizer.step()
    scheduler.step()
