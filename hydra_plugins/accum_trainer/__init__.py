"""What Hydra finds of accum_trainer: the config group `accumulate_grad_batches`, one YAML file per
policy.

Hydra imports every module in the namespace package `hydra_plugins`, in each application of an
environment that has this one installed, so it stays this small. Nothing in `accum_trainer` imports
it or knows Hydra. `hydra_plugins` must never get an `__init__.py`: it would hide the plugins of all
others.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class AccumTrainerSearchPath(SearchPathPlugin):
    """Offers the group to every application."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append, so that a policy of the same name in the application's own configuration is the
        one taken."""
        search_path.append(provider="accum_trainer", path=f"pkg://{__name__}")
