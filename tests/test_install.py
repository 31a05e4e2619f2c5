"""What people find before the code: shipped configurations by name, the Slurm script, the files beside the package."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from vit5gen.config import find_config, load_config
from vit5gen.system.errors import UserError
from vit5gen.training.propose import DOCUMENTATION

ROOT = Path(__file__).parents[1]


def test_a_name_without_a_path_is_a_configuration_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart") == load_config(ROOT / "configs/quickstart.yaml")
    assert find_config("vae/emoji") == ROOT / "configs/vae/emoji.yaml"
    assert find_config("quickstart.yaml") == Path("quickstart.yaml")
    Path("quickstart").write_text("model: {preset: S/2}")  # a file of that name comes first
    assert load_config("quickstart").model.preset == "S/2"
    with pytest.raises(UserError, match=r"quickstrat: No such file.* Did you mean 'quickstart'"):
        load_config("quickstrat")


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (2, False)])
def test_the_slurm_script_queues_a_stopped_run_again(tmp_path: Path, code: int, requeued: bool) -> None:
    (tmp_path / "srun").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/srun.log\nexit {code}\n')
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol.log\necho node7\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node7"}
    done = subprocess.run(["bash", ROOT / "docs/train.sbatch", "c.yaml", "--output", "r"], env=environment, check=False)
    assert done.returncode == code
    assert "exec python train.py" in (tmp_path / "srun.log").read_text()
    assert (tmp_path / "srun.log").read_text().endswith("train c.yaml --output r\n")
    assert ("requeue 12" in (tmp_path / "scontrol.log").read_text()) == requeued


def test_the_files_beside_the_package_agree_with_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"] == [{"name": "The vit5gen authors"}]
    assert project["urls"]["Homepage"] == citation["repository-code"]
    assert project["urls"]["Documentation"] == DOCUMENTATION
    newest = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == f"{citation['version']} ({citation['date-released']})"
    done = subprocess.run([sys.executable, "-m", "vit5gen", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"vit5gen {project['version']}\n"
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["run"]["steps"] if "run" in step] == [".ci/run"]


def test_configurations_of_others_beside_an_installed_package_are_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("vit5gen/configs", "configs"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "quickstart.yaml").write_text("model: {preset: S/2}")
    monkeypatch.setattr("vit5gen.config.__file__", str(tmp_path / "vit5gen/config.py"))
    assert find_config("quickstart") == tmp_path / "vit5gen/configs/quickstart.yaml"
