"""Training steps with one fault each, as people write them: `verify --loop` must name it."""

import contextlib

import torch
from torch.nn.utils import clip_grad_norm_

from tests.verify_loops.correct import all_targets, num_targets, summed_loss


def idiom(accelerator, model, optimizer, scheduler, batches, weigh):
    """Accelerate's idiom; `weigh(loss sum, targets)` is the loss that backward gets."""
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(weigh(summed_loss(model, batch), num_targets([batch])))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def by_hand(
    accelerator, model, optimizer, scheduler, batches, before_step=None, after_each=None, clear=True
):
    """A right loop without accumulate(), with places for a fault."""
    total = all_targets(accelerator, batches)
    for index, batch in enumerate(batches):
        is_last = index == len(batches) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            (summed_loss(model, batch) * accelerator.num_processes / total).backward()
        if after_each is not None:
            after_each(is_last)
    if before_step is not None:
        before_step()
    optimizer.step()
    scheduler.step()
    if clear:
        optimizer.zero_grad()


def mean_of_means(accelerator, model, optimizer, scheduler, batches):
    """What every tutorial has; nan if a micro-batch has no target."""
    idiom(accelerator, model, optimizer, scheduler, batches, lambda loss, n: loss / n)


def own_loss_of_the_model(accelerator, model, optimizer, scheduler, batches):
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def zero_over_zero(accelerator, model, optimizer, scheduler, batches):
    """A masked mean written out: its gradient is nan if the mask is empty."""
    for batch in batches:
        with accelerator.accumulate(model):
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            losses = (
                -logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            )
            mask = (labels != -100).float()
            accelerator.backward((losses * mask).sum() / mask.sum())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def divided_by_k_twice(accelerator, model, optimizer, scheduler, batches):
    total = all_targets(accelerator, batches)
    idiom(
        accelerator,
        model,
        optimizer,
        scheduler,
        batches,
        lambda loss, n: loss * accelerator.num_processes / total,
    )


def tail_divided_by_k(accelerator, model, optimizer, scheduler, batches):
    factor = accelerator.num_processes * len(batches) / all_targets(accelerator, batches)
    idiom(accelerator, model, optimizer, scheduler, batches, lambda loss, n: loss * factor)


def normalised_per_rank(accelerator, model, optimizer, scheduler, batches):
    steps, mine = accelerator.gradient_accumulation_steps, num_targets(batches)
    idiom(accelerator, model, optimizer, scheduler, batches, lambda loss, n: loss * steps / mine)


def not_times_processes(accelerator, model, optimizer, scheduler, batches):
    steps, total = accelerator.gradient_accumulation_steps, all_targets(accelerator, batches)
    idiom(accelerator, model, optimizer, scheduler, batches, lambda loss, n: loss * steps / total)


def clip_per_micro_step(accelerator, model, optimizer, scheduler, batches):
    def clip(is_last):
        accelerator.clip_grad_norm_(model.parameters(), 0.3)

    by_hand(accelerator, model, optimizer, scheduler, batches, after_each=clip)


def scheduler_per_micro_step(accelerator, model, optimizer, scheduler, batches):
    def step(is_last):
        if not is_last:
            scheduler.step()

    by_hand(accelerator, model, optimizer, scheduler, batches, after_each=step)


def zero_grad_per_micro_step(accelerator, model, optimizer, scheduler, batches):
    def zero(is_last):
        if not is_last:
            model.zero_grad()

    by_hand(accelerator, model, optimizer, scheduler, batches, after_each=zero)


def no_zero_grad(accelerator, model, optimizer, scheduler, batches):
    by_hand(accelerator, model, optimizer, scheduler, batches, clear=False)


def step_per_micro_batch(accelerator, model, optimizer, scheduler, batches):
    factor = accelerator.num_processes / all_targets(accelerator, batches)
    for batch in batches:
        (summed_loss(model, batch) * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
    scheduler.step()


def summed_over_micro_batches(accelerator, model, optimizer, scheduler, batches):
    """Means, and nobody divides by K."""
    for batch in batches:
        (summed_loss(model, batch) / num_targets([batch])).backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def first_labels(batches):
    """Labels that are not -100, the first of a row among them: what transformers.Trainer counts."""
    return sum(int((batch["labels"] != -100).sum()) for batch in batches)


def counts_first_labels(accelerator, model, optimizer, scheduler, batches):
    """transformers.Trainer on GPT-2: the sum of the losses over N = (labels != -100).sum()."""
    mine = torch.tensor([first_labels(batches)], device=accelerator.device)
    factor = (
        accelerator.num_processes
        * accelerator.gradient_accumulation_steps
        / int(accelerator.gather(mine).sum())
    )
    idiom(accelerator, model, optimizer, scheduler, batches, lambda loss, n: loss * factor)


def weighs_by_first_labels(accelerator, model, optimizer, scheduler, batches):
    """The model's mean loss, weighed by labels that are not -100."""
    mine = torch.tensor([first_labels(batches)], device=accelerator.device)
    factor = (
        accelerator.num_processes
        * accelerator.gradient_accumulation_steps
        / int(accelerator.gather(mine).sum())
    )
    for batch in batches:
        with accelerator.accumulate(model):
            mean = summed_loss(model, batch) / max(1, num_targets([batch]))
            accelerator.backward(mean * first_labels([batch]) * factor)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def means_over_first_labels(accelerator, model, optimizer, scheduler, batches):
    """Every micro-batch has the same weight, and each mean is over labels that are not -100."""
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(summed_loss(model, batch) / max(1, first_labels([batch])))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def per_rank_over_first_labels(accelerator, model, optimizer, scheduler, batches):
    factor = accelerator.gradient_accumulation_steps / first_labels(batches)
    idiom(accelerator, model, optimizer, scheduler, batches, lambda loss, n: loss * factor)


def accumulated_in_bf16(accelerator, model, optimizer, scheduler, batches):
    total = all_targets(accelerator, batches)
    kept = [torch.zeros_like(p, dtype=torch.bfloat16) for p in model.parameters()]
    for batch in batches:
        with accelerator.no_sync(model):
            (summed_loss(model, batch) / total).backward()
        for p, sum_ in zip(model.parameters(), kept, strict=True):
            sum_ += p.grad.bfloat16()
        model.zero_grad()
    for p, sum_ in zip(model.parameters(), kept, strict=True):
        p.grad = accelerator.reduce(sum_.float(), "sum")
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def left_out_of_the_exchange(accelerator, model, optimizer, scheduler, batches):
    """The final norm's gradient is each rank's own, as if DDP ignored that parameter."""
    plain = accelerator.unwrap_model(model)
    total = all_targets(accelerator, batches)
    own = torch.autograd.grad(
        sum(summed_loss(plain, batch) for batch in batches) * accelerator.num_processes / total,
        plain.model.norm.weight,
    )[0]

    def put():
        plain.model.norm.weight.grad.copy_(own)

    by_hand(accelerator, model, optimizer, scheduler, batches, before_step=put)


def never_exchanged(accelerator, model, optimizer, scheduler, batches):
    """The last backward runs through the plain model, around DDP."""
    plain = accelerator.unwrap_model(model)
    total = all_targets(accelerator, batches)
    for batch in batches:
        (summed_loss(plain, batch) * accelerator.num_processes / total).backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def scheduler_before_optimizer(accelerator, model, optimizer, scheduler, batches):
    """Every update has the learning rate of the next."""
    total = all_targets(accelerator, batches)
    factor = accelerator.num_processes * accelerator.gradient_accumulation_steps / total
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(summed_loss(model, batch) * factor)
            scheduler.step()
            optimizer.step()
            optimizer.zero_grad()


def rate_per_micro_batch(accelerator, model, optimizer, scheduler, batches):
    """A decay of the learning rate by hand, once per micro-batch."""

    def decay(is_last):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    by_hand(accelerator, model, optimizer, scheduler, batches, after_each=decay)


def rate_times_micro_batches(accelerator, model, optimizer, scheduler, batches):
    """The learning rate scaled by K in every update, before the scheduler sets it anew."""

    def scale():
        for group in optimizer.param_groups:
            group["lr"] *= accelerator.gradient_accumulation_steps

    by_hand(accelerator, model, optimizer, scheduler, batches, before_step=scale)


def decays_weights_by_hand(accelerator, model, optimizer, scheduler, batches):
    by_hand(accelerator, model, optimizer, scheduler, batches)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)


def update_thrown_away(accelerator, model, optimizer, scheduler, batches):
    kept = [p.detach().clone() for p in model.parameters()]
    by_hand(accelerator, model, optimizer, scheduler, batches)
    with torch.no_grad():
        for p, before in zip(model.parameters(), kept, strict=True):
            p.copy_(before)


def second_optimizer(accelerator, model, optimizer, scheduler, batches):
    """Another SGD on the same parameters steps as well."""
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    by_hand(accelerator, model, optimizer, scheduler, batches, before_step=own.step)


def moves_one_weight(accelerator, model, optimizer, scheduler, batches):
    """One parameter is shifted besides, alike on all ranks."""
    by_hand(accelerator, model, optimizer, scheduler, batches)
    with torch.no_grad():
        accelerator.unwrap_model(model).lm_head.weight.add_(0.01)


def hook_changes_gradient(accelerator, model, optimizer, scheduler, batches):
    """A hook of optimizer.step() halves what the optimizer was handed."""

    def halve(inner, *_):
        for p in inner.param_groups[0]["params"]:
            p.grad.mul_(0.5)

    handle = optimizer.optimizer.register_step_pre_hook(halve)
    by_hand(accelerator, model, optimizer, scheduler, batches)
    handle.remove()


def cuts_long_rows(accelerator, model, optimizer, scheduler, batches):
    cut = [{key: value[:, :100] for key, value in batch.items()} for batch in batches]
    by_hand(accelerator, model, optimizer, scheduler, cut)


CALLS = []


def wrong_after_first_calls(accelerator, model, optimizer, scheduler, batches):
    CALLS.append(len(batches))
    right = len(CALLS) <= 4
    (by_hand if right else mean_of_means)(accelerator, model, optimizer, scheduler, batches)


def wrong_in_its_own_way(accelerator, model, optimizer, scheduler, batches):
    """Something no list of faults has: every weight's gradient is squared."""

    def square():
        for p in model.parameters():
            p.grad.copy_(p.grad.abs().sqrt())

    by_hand(accelerator, model, optimizer, scheduler, batches, before_step=square)


def too_long(accelerator, model, optimizer, scheduler, batches):
    """The right direction, 1.7 times the length."""

    def stretch():
        for p in model.parameters():
            p.grad.mul_(1.7)

    by_hand(accelerator, model, optimizer, scheduler, batches, before_step=stretch)


def clipped_to_another_norm(accelerator, model, optimizer, scheduler, batches):
    by_hand(
        accelerator,
        model,
        optimizer,
        scheduler,
        batches,
        before_step=lambda: clip_grad_norm_(model.parameters(), 0.01),
    )


def does_nothing(accelerator, model, optimizer, scheduler, batches):
    pass


def steps_on_the_main_process_only(accelerator, model, optimizer, scheduler, batches):
    """As if the update, like a checkpoint, were the main process's work."""
    total = all_targets(accelerator, batches)
    for index, batch in enumerate(batches):
        is_last = index == len(batches) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            (summed_loss(model, batch) * accelerator.num_processes / total).backward()
    if accelerator.is_main_process:
        optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def raises(accelerator, model, optimizer, scheduler, batches):
    """A slip: the batch has no such key."""
    for batch in batches:
        batch["attention"]


def raises_on_one_rank(accelerator, model, optimizer, scheduler, batches):
    if accelerator.process_index == accelerator.num_processes - 1:
        raise ValueError("only here")
    all_targets(accelerator, batches)


def takes_too_few(accelerator, model, optimizer, batches):
    raise AssertionError("must not be called")


def takes_too_many(accelerator, model, optimizer, scheduler, batches, steps):
    raise AssertionError("must not be called")


def wants_a_keyword(accelerator, model, optimizer, scheduler, batches, *, steps):
    raise AssertionError("must not be called")


def takes_another_order(model, accelerator, optimizer, scheduler, batches):
    raise AssertionError("must not be called")


def takes_any(*objects, **options):
    by_hand(*objects, **options)
