"""A wheel, installed outside the clone, brings all that the commands need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest

from tests.launching import ROOT, environment

PACKAGED = ("accum_trainer", "hydra_plugins", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*command, cwd, **more):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**more, PYTHONPATH=""),  # not the clone
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The `bin` of an environment that has the wheel, and this one's other packages beside it."""
    place = tmp_path_factory.mktemp("install")
    tree = place / "tree"
    tree.mkdir()
    for name in PACKAGED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, tree, cwd=place)
    (wheel,) = place.glob("*.whl")
    venv.create(place / "venv", with_pip=True)
    bin = place / "venv" / "bin"
    # A path in a .pth file is not itself searched for .pth files: the clone stays out.
    packages = run(
        bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place
    ).stdout.strip()
    with open(os.path.join(packages, "others.pth"), "w") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    run(bin / "python", "-m", "pip", "--quiet", "install", "--no-deps", wheel, cwd=place)
    where = run(
        bin / "python", "-c", "import accum_trainer; print(accum_trainer.__file__)", cwd=place
    )
    assert where.stdout.startswith(packages)
    return bin


def test_train_runs_from_a_wheel(installed, tmp_path):
    batch = ("--batch-size", 2, "--global-batch-size", 4, "--steps", 2, "--max-seq-len", 32)
    run(
        installed / "accum-trainer", "train", "--cpu", *batch, "--output-dir", "run",
        cwd=tmp_path, OMP_NUM_THREADS=1,
    )  # fmt: skip
    assert json.loads((tmp_path / "run" / "result.json").read_text())["done"]


@pytest.mark.long
def test_launch_runs_from_a_wheel(installed, tmp_path):
    shutil.copy(ROOT / "launch_configs" / "cpu_2proc.yaml", tmp_path)
    batch = ("--batch-size", 2, "--global-batch-size", 4, "--steps", 2, "--max-seq-len", 32)
    run(
        installed / "accum-trainer", "launch", "cpu_2proc.yaml",
        "--", "--cpu", *batch, "--output-dir", "run",
        cwd=tmp_path, OMP_NUM_THREADS=1,
    )  # fmt: skip
    assert json.loads((tmp_path / "run" / "result.json").read_text())["done"]
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["world_size"] == 2


def test_every_module_and_template_is_in_the_wheel(installed):
    packages = run(
        installed / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
        cwd=installed,
    ).stdout.strip()  # fmt: skip
    ours = {p.relative_to(ROOT) for p in (ROOT / "accum_trainer").rglob("*.py")}
    for name in ("py.typed", "runs/report.html", "panel/panel.css"):
        ours.add((ROOT / "accum_trainer" / name).relative_to(ROOT))
    for path in ours:
        assert os.path.exists(os.path.join(packages, path)), path
