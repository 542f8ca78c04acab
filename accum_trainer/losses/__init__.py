"""What a loss sums over, proven on the user's model; and a summed loss of our own.

targets        ways to count the terms of a loss
outputs        what the prepared models returned
probe          one batch, changed so that two ways to count tell apart
objective      find what the model's own loss averages over, and prove it
contract       what a loss passed to `backward` is: a sum or a mean, and over what
head           the output head: logits only at targets
causal_lm      the summed next-token loss
packing_proof  whether a model keeps samples apart that lie in one row
packing        which inputs it needs for that
packing_guard  refuse packed rows that a model would mix
"""
