"""Sources of windows: this rank's micro-batches of each update. No rank talks to another here.

shares      the contract: what a source gives to one rank of each window
dataset     a map-style data set, in the global order, cut by `window_plan`
loader      a DataLoader: its batches in its order, dealt to the ranks in turn
stream      batches that are this rank's already
prefetched  any of them, read in a thread
drawing     seeds of what is drawn while samples are read
progress    the epoch and position of each source
collating   samples -> one micro-batch, padded or packed
build       from what a user passes to one of these
"""
