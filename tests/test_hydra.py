"""The policies of `accumulate_grad_batches`, composed by real Hydra applications outside this
tree."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
import yaml
from hydra import compose, initialize_config_dir

from tests.launching import ROOT, environment

POLICIES = {"train": 2, "val": 1, "test": 1, "default": 2, "high": 8, "debug": 1}
PLUGIN = ROOT / "hydra_plugins" / "accum_trainer"

CONFIG = """
defaults:
  - accumulate_grad_batches: train
  - accumulate_grad_batches@val_loader: val
  - data: text
  - _self_
trainer:
  k: ${accumulate_grad_batches}
  k_of_val: ${val_loader.accumulate_grad_batches}
"""
DATA = """
defaults:
  - /accumulate_grad_batches@loader: high
rows: 3
"""
APPLICATION = """
import json, sys
import hydra
from omegaconf import OmegaConf

@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg):
    heavy = sorted({"accum_trainer", "torch"} & set(sys.modules))
    print(json.dumps({"cfg": OmegaConf.to_container(cfg, resolve=True), "heavy": heavy}))

main()
"""


@pytest.fixture
def conf(tmp_path):
    """The configuration of an application in an empty directory, from which only an installed
    plugin is found."""
    folder = tmp_path / "conf"
    (folder / "data").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "data" / "text.yaml").write_text(DATA)
    (tmp_path / "app.py").write_text(APPLICATION)
    return folder


def application(conf, *overrides, python=(sys.executable,), **more):
    program = [*python, "app.py", *overrides, "hydra.run.dir=out", "hydra.sweep.dir=out"]
    kept = environment(**more)
    return subprocess.run(
        program, cwd=conf.parent, env=kept, capture_output=True, text=True, timeout=120
    )


def composed(run):
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def composition(conf, *overrides, config_name="config"):
    with initialize_config_dir(str(conf), version_base=None):
        return compose(config_name, list(overrides))


def test_r20_each_policy_is_its_number_everywhere_it_is_interpolated(conf):
    jobs = composed(
        application(conf, "--multirun", f"accumulate_grad_batches={','.join(POLICIES)}")
    )
    assert [job["cfg"]["accumulate_grad_batches"] for job in jobs] == list(POLICIES.values())
    for job in jobs:
        assert type(job["cfg"]["accumulate_grad_batches"]) is int
        assert job["cfg"]["trainer"] == {"k": job["cfg"]["accumulate_grad_batches"], "k_of_val": 1}
        assert job["heavy"] == []  # what Hydra imports of this package costs an application nothing


def test_r20_each_stage_is_overridden_alone_from_the_command_line(conf):
    overrides = [
        "accumulate_grad_batches=debug",
        "accumulate_grad_batches@val_loader=high",
        "accumulate_grad_batches@data.loader=test",
        "+accumulate_grad_batches@test_loader=test",
    ]
    (job,) = composed(application(conf, *overrides))
    assert job["cfg"] == {
        "accumulate_grad_batches": 1,
        "val_loader": {"accumulate_grad_batches": 8},
        "data": {"loader": {"accumulate_grad_batches": 1}, "rows": 3},
        "test_loader": {"accumulate_grad_batches": 1},
        "trainer": {"k": 1, "k_of_val": 8},
    }


def test_r20_unknown_policy_names_the_six(conf):
    run = application(conf, "accumulate_grad_batches=hihg")
    assert run.returncode == 1
    assert "Could not find 'accumulate_grad_batches/hihg'" in run.stderr
    listed = run.stderr.split("Available options in 'accumulate_grad_batches':\n")[1].split(
        "\nConfig search path"
    )[0]
    assert listed.split() == sorted(POLICIES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("accumulate_grad_batches=16", "Config group override must be a string or a list. Got int"),
        ("++accumulate_grad_batches=16", "force-add of config groups is not supported"),
    ],
)
def test_a_number_is_no_policy_and_hydra_says_what_the_guide_says(conf, override, message):
    with pytest.raises(
        Exception, match=re.escape(message)
    ):  # Hydra raises a ValueError for one, its own for the other
        composition(conf, override)
    assert message in " ".join((ROOT / "docs/hydra.md").read_text().split())


def test_a_number_is_given_to_a_stage_or_to_the_key_that_uses_it(conf):
    cfg = composition(conf, "val_loader.accumulate_grad_batches=4", "trainer.k=16")
    assert (cfg.accumulate_grad_batches, cfg.val_loader.accumulate_grad_batches) == (2, 4)
    assert cfg.trainer == {"k": 16, "k_of_val": 4}


def test_the_applications_own_policies_join_and_win(conf):
    own = conf / "accumulate_grad_batches"
    own.mkdir()
    for name, number in (("sixteen", 16), ("high", 64)):
        (own / f"{name}.yaml").write_text(
            f"# @package _global_\naccumulate_grad_batches: {number}\n"
        )
    for name, number in (POLICIES | {"sixteen": 16, "high": 64}).items():
        assert composition(conf, f"accumulate_grad_batches={name}").trainer.k == number


def test_a_number_in_the_primary_config_beats_the_policy(conf):
    (conf / "config.yaml").write_text(CONFIG + "accumulate_grad_batches: 5\n")
    assert composition(conf).trainer.k == 5
    assert composition(conf, "accumulate_grad_batches=high").trainer.k == 5


def test_an_application_that_does_not_ask_gets_nothing(conf):
    (conf / "plain.yaml").write_text("lr: 0.1\n")
    assert composition(conf, config_name="plain") == {"lr": 0.1}
    added = composition(conf, "+accumulate_grad_batches=high", config_name="plain")
    assert added == {"lr": 0.1, "accumulate_grad_batches": 8}


def test_lives_beside_other_plugins_and_search_paths(conf, tmp_path):
    other = tmp_path / "site" / "hydra_plugins" / "other"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("print('other plugin found')\n")
    (conf / "config.yaml").write_text(f"{CONFIG}\nhydra: {{searchpath: ['file://{tmp_path}']}}\n")
    run = application(conf, PYTHONPATH=tmp_path / "site")
    assert composed(run)[0]["cfg"]["trainer"] == {"k": 2, "k_of_val": 1}
    assert "other plugin found" in run.stdout
    assert run.stderr == ""  # Hydra warns of a search path that it cannot open


def test_a_wheel_holds_plugin_and_policies_and_works(conf, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("accum_trainer", "hydra_plugins"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(target)], cwd=source, check=True, capture_output=True
    )
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if name.startswith("hydra_plugins/")}
        packed.extractall(target)
    assert names == {
        str(path.relative_to(ROOT)) for path in (PLUGIN / "__init__.py", *PLUGIN.glob("*/*.yaml"))
    }
    # Without `site` there is no editable install, so only the wheel can have given the policy.
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib")])
    run = application(
        conf, "accumulate_grad_batches=high", python=(sys.executable, "-S"), PYTHONPATH=path
    )
    assert composed(run)[0]["cfg"]["trainer"]["k"] == 8


def test_the_guide_has_the_policies_as_they_are():
    files = {
        path.stem: yaml.safe_load(path.read_text())
        for path in PLUGIN.glob("accumulate_grad_batches/*.yaml")
    }
    assert files == {name: {"accumulate_grad_batches": number} for name, number in POLICIES.items()}
    table = re.findall(r"^\| `(\w+)` \| (\d+) \|", (ROOT / "docs/hydra.md").read_text(), re.M)
    assert {name: int(number) for name, number in table} == POLICIES


def test_nothing_of_the_package_imports_hydra():
    for path in (ROOT / "accum_trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {
                "hydra",
                "hydra_plugins",
                "omegaconf",
            }, path
    assert not (
        PLUGIN.parent / "__init__.py"
    ).exists()  # it would hide the plugins of every other package
