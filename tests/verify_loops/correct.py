"""Training steps that are right: `verify --loop` must pass them."""

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
