"""Sources of windows: this rank's micro-batches of each update. No rank talks to another here.

shares      the contract: one rank's share of each window
drawing     seeds of the random numbers that reading draws
content     digests of samples and batches
options     how a source is read
collating   samples -> one micro-batch, padded or packed
dataset     a map-style data set in the global order, split by `window_plan`
loader      a DataLoader: its batches in its order, batch i to rank i % W
stream      batches that are already this rank's
prefetched  another source, read in a thread
progress    the epoch and position of each source
build       choose one for a user's data
"""
