"""From rows to this process's micro-batches.

rows        the row formats, and which of their characters are trained on
files       files and hub data sets, read through `datasets`
embedded    text and a tokenizer that need no download
tokenizing  rows -> token ids and labels, cached
collating   samples -> one padded micro-batch
windows     a data set, DataLoader or stream -> this rank's part of each window
"""
