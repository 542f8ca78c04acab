"""From rows in a file to token ids and labels.

rows        the row formats, and which part of each is trained on
literal     CSV and JSON values exactly as written
files       files and hub data sets, read through `datasets`
counting    the number of rows in a file, without torch
embedded    text and a tokenizer that need no download
checking    faults in the content of files, by line
skipped     the rows that were left out
tokenizing  rows -> token ids and labels, cached
"""
