"""`accum-trainer doctor`: what this machine offers, what would not work, the command that mends it.

Every check tries the real thing: it compiles, binds, writes, multiplies. None trains the user's
model or reads the user's data.
"""
