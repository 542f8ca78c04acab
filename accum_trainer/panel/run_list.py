"""The list of runs beside a page: all of the folder, independent runs under the name of theirs."""

from __future__ import annotations

import html
from collections.abc import Iterator
from urllib.parse import quote

from accum_trainer.panel.curves import number
from accum_trainer.panel.group_view import GroupView
from accum_trainer.panel.run_view import ACTIVE, SAID, find_groups, find_runs, sendable
from accum_trainer.panel.shell import Panel, markup

# Of runs that have ended, this many are read for the list.
_LISTED = 60


class RunList:
    """The list on one page; `here` is the name of the run, or group, that the page shows."""

    def __init__(self, panel: Panel, here: str | None) -> None:
        self._panel, self._here = panel, here
        self._list = markup("", "ul")

    def show(self) -> list[str]:
        """Show what is there now; returns the names of all runs."""
        names, groups = find_runs(self._panel.runs), find_groups(self._panel.runs)
        self._list.set_content("".join(self._entries(names[:_LISTED], groups)))
        return names

    def _entries(self, names: list[str], groups: list[str]) -> Iterator[str]:
        """A group stands where its member that changed last would."""
        members: dict[str, list[str]] = {group: [] for group in groups}
        top: dict[str, None] = {}
        for name in names:
            group = name.rpartition("/")[0]
            if group in members:
                members[group].append(name)
            top[group if group in members else name] = None
        for name in [*(group for group in groups if group not in top), *top]:
            if name not in members:
                yield self._run(name)
                continue
            yield self._group(self._panel.group(name))
            yield from (self._run(member, name) for member in sorted(members[name]))

    def _run(self, name: str, group: str = "") -> str:
        view = self._panel.view(name)
        is_settled = view.state not in ACTIVE and bool(view.records.last)
        view.refresh(at_most_every_sec=5.0 if is_settled else 0.4, whole=False)
        loss = number(view.records.last.get("loss"))
        total = f"/{view.total:,}" if view.total else ""
        said = f"{view.updates:,}{total}" + ("" if loss is None else f" · loss {loss:.3f}")
        shown = name[len(group) + 1 :] if group else name
        return self._entry(name, shown, view.state, said, "member" if group else "")

    def _group(self, group: GroupView) -> str:
        group.refresh(whole=False)
        count = len(group.members)
        return self._entry(group.name, group.name, group.state, f"{count} independent runs")

    def _entry(self, name: str, shown: str, state: str, said: str, classes: str = "") -> str:
        here = ' aria-current="page"' if name == self._here else ""
        return (
            f'<li class="{classes}"><a href="/watch?run={quote(sendable(name))}"{here}>'
            f'<i class="dot {state}"></i><b>{html.escape(sendable(shown))}</b>'
            f"<span>{SAID[state]} · {said}</span></a></li>"
        )
