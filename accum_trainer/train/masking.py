"""Secrets in texts that leave this machine: with a tracker, or with a published model.

Knows no option.
"""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"(//)[^/@\s]+(?=@)"  # a URL's user and password
    r"|([?&][\w-]*(?:token|key|sig|signature|secret|password|credential)=)[^&\s]+"
    # access tokens of common services
    r"|()\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA)[\w-]{8,}",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """`text` with `***` in the place of passwords, signatures and access tokens."""
    return _SECRET.sub(lambda found: f"{found[1] or found[2] or ''}***", text)
