"""Tables of wrong input, name -> (arguments, parts of the message), and how a refusal is checked:
status 2, one message that names the thing, no traceback, and nothing written."""

from __future__ import annotations


def snapshot(folder):
    return sorted(
        (str(path.relative_to(folder)), path.is_file() and path.stat().st_size)
        for path in folder.rglob("*")
    )


def refused(run, folder, *argv, says, **env):
    """Run a command with wrong input in `folder`; check status and message, and that nothing
    changed."""
    before = snapshot(folder)
    finished = run(*argv, cwd=folder, **env)
    assert finished.status == 2, finished.err
    for part in says if isinstance(says, tuple) else (says,):
        assert part in finished.error, finished.error
    assert ".;" not in finished.error  # another library's sentence inside ours
    assert snapshot(folder) == before
