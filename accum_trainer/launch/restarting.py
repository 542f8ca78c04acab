"""What a launcher asks about another start; here, that there is none."""

from __future__ import annotations

from collections.abc import Sequence


class Restarting:
    """Decides on another start. This one: the first is the only one, and no other node counts."""

    def has_met(self) -> None:
        """The processes run, so those of all nodes have met."""

    def after_failure(self) -> tuple[Sequence[str] | None, str]:
        """(arguments of `train` for the next start or None, a line for the user)."""
        return None, ""

    def is_over(self) -> bool:
        """Whether a start that waits for other nodes waits in vain."""
        return False

    def lost_node(self) -> int | None:
        """A node whose processes have failed in the start that is under way here."""
        return None
