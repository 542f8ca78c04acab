"""The terms that a loss sums over, proven on the user's model; and a summed next-token loss.

targets        ways to count the terms of a loss
outputs        losses that the prepared models returned
dry_run        run a model and leave no trace
chunked        summed cross-entropy of a linear head, few logits at a time
patched_head   the forward that replaces the output head's
head           which way to compute the loss holds for a model
probe          batches that distinguish two ways of counting
trial          run them and record the losses
objective      find what the model's own loss averages over, and prove it
packing_proof  the proof that a model keeps packed samples apart
packing        which inputs it needs for that
packing_guard  refuse packed rows that a model would mix
causal_lm      the summed next-token loss
contract       a loss passed to `backward`: a sum or a mean, and its terms
"""
