"""The panel: a local web page that sets up, starts, stops and watches trainings.

`form` (what was typed), `preview` (what it means: batch, plan, warnings) and `commands` (the exact
command line) know no page; `processes` starts and stops runs; `run_view` reads what they write;
`guard` decides which requests are answered. Only `server`, `shell` and the modules called `*_page`
import NiceGUI, the extra `[panel]`. No page keeps a run: each is a process of its own, and all that
is shown is read from its run directory.
"""
