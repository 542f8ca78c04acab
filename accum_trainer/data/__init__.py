"""From rows in a file to token ids and labels.

rows        the row formats, and which of their characters are trained on
files       files and hub data sets, read through `datasets`
literal     CSV and JSON values exactly as they are written
counting    rows of a file, without reading it whole
embedded    text and a tokenizer that need no download
tokenizing  rows -> token ids and labels, cached
"""
