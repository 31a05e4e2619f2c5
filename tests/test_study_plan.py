"""Tests of a study's file: its runs, its bad input, and the budgets of the studies that ship."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import make_inputs

from vit5gen.config import read_yaml
from vit5gen.lab.study.plan import Run, StudyConfig, read_study
from vit5gen.section import validate
from vit5gen.system.errors import UserError
from vit5gen.training.dry_run import run_cost

STUDIES = sorted((Path(__file__).parents[1] / "configs" / "studies").glob("*.yaml"))


def write_study(folder: Path, **changes: Any) -> Path:
    """Write a study of two backbones and two seeds over the tiny run."""
    study: dict[str, Any] = {
        "base": make_inputs(folder).name if not (folder / "run.yaml").exists() else "run.yaml",
        "seeds": [0, 1],
        "overrides": {"training.num_steps": 4, "training.trackers": []},
        "grid": {"backbone": {"vit5": {}, "sit": {"model.backbone": "sit", "model.backbone_kwargs": {}}}},
        "baseline": {"backbone": "vit5"},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return folder / "study.yaml"


def test_every_combination_runs_from_every_seed(tmp_path: Path) -> None:
    grid = {
        "gamma": {"one": {"model.backbone_kwargs.gamma_init": 1.0}, "small": {"model.backbone_kwargs.gamma_init": 0.5}},
        "norm": {"rms": {}, "layer": {"model.backbone_kwargs.norm": "layer"}},
    }
    _, runs = read_study(write_study(tmp_path, grid=grid, baseline={}))
    assert [run.name for run in runs] == [
        f"{gamma}, {norm}, seed {seed}" for seed in (0, 1) for gamma in ("one", "small") for norm in ("rms", "layer")
    ]
    last = runs[-1].config
    assert last.training.seed == 1
    assert last.training.num_steps == 4
    assert last.model.backbone_kwargs == {"gamma_init": 0.5, "norm": "layer"}


def test_some_cells_have_more_seeds(tmp_path: Path) -> None:
    more = {"vit5": [7, 1], "sit": [7]}
    _, runs = read_study(write_study(tmp_path, more_seeds=more))
    assert [run.name for run in runs if run.seed > 1] == ["vit5, seed 7", "sit, seed 7"]
    assert len(runs) == 6


def test_runs_save_where_they_are_scored(tmp_path: Path) -> None:
    overrides = {"training.num_steps": 90, "training.checkpoint_every": 7, "training.log_every": 10}
    for run in read_study(write_study(tmp_path, overrides=overrides, score_at=[30, 60, 90]))[1]:
        assert (run.config.training.checkpoint_every, run.config.training.keep_every) == (30, 30)
        assert run.steps == (30, 60, 90)
    with pytest.raises(UserError, match=r"multiples of training.log_every = 20"):
        read_study(write_study(tmp_path, overrides=overrides | {"training.log_every": 20}, score_at=[30, 60, 90]))


def test_sizes_of_latents_are_found(tmp_path: Path) -> None:
    """A held-out loss draws noise in their shape, and a row of an earlier version has recorded them."""
    file = write_study(tmp_path)
    content = yaml.safe_load((tmp_path / "run.yaml").read_text())
    content["vae"] = {"name": content["vae"]["name"]}
    content["data"]["resolution"] = 12  # no multiple of 8
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    assert {run.config.latent_shape for run in read_study(file)[1]} == {(4, 6, 6)}


def test_a_cell_does_not_change_the_next(tmp_path: Path) -> None:
    overrides = {"model.backbone_kwargs": {"gamma_init": 0.5}}
    layer, bias = {"model.backbone_kwargs.norm": "layer"}, {"model.backbone_kwargs.qkv_bias": True}
    grid = {"change": {"none": {}, "layer": layer, "bias": bias}}
    _, runs = read_study(write_study(tmp_path, overrides=overrides, grid=grid, baseline={}, seeds=[0]))
    assert [run.config.model.backbone_kwargs for run in runs] == [
        {"gamma_init": 0.5},
        {"gamma_init": 0.5, "norm": "layer"},
        {"gamma_init": 0.5, "qkv_bias": True},
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"width": {"wide": {"model.hiden_size": 64}}}}, "wide.*unknown key 'model.hiden_size'.*hidden_size"),
        ({"grid": {"a": {"x": {"model.backbone_kwargs.gama": 1}}}}, "grid x.*'gama' is not an option.*gamma_init"),
        ({"grid": {"a": {"x": {"seed": 1}}}}, "grid x.*unknown key 'seed'"),
        ({"grid": {"a": {"x": {"training.seed": 1}}}}, "training.seed; move it to the seeds"),
        ({"grid": {"a": {"x": {"data.resolution": 16}}, "b": {"y": {"data.resolution": 8}}}}, "set by two axes"),
        ({"grid": {"a": {"x": {"model.hidden_size.x": 1}}}}, "unknown key 'model.hidden_size.x': 32 has no 'x'"),
        ({"grid": {"a": {"x": {"training.num_steps": 0}}}}, "num_steps = 0"),
        ({"grid": {"a": {"x": {"training.micro_batch_size": 3}}}}, "micro_batch_size = 3 must divide"),
        ({"grid": {"a": {"../x": {}}}}, "'../x' cannot be the name"),
        ({"grid": {"a": {"x|y": {}}}}, r"'x\|y' cannot be the name"),
        ({"grid": {"a": {"p": {}, "p, q": {}}, "b": {"q, r": {}, "r": {}}}}, "two cells are called 'p, q, r'"),
        ({"grid": {"a": {}}}, "every axis a level"),
        ({"baseline": {"backbone": "vit6"}}, "baseline backbone: 'vit6' is not known.*Did you mean 'vit5'"),
        ({"baseline": {"back": "vit5"}}, "axis: 'back' is not known.*Did you mean 'backbone'"),
        ({"grid": {"a": {"x": {}, "y": {"evaluation.extractor": "inception"}}}}, "effnet-lite0 and inception; use one"),
        ({"seeds": [0, 0]}, "list a seed twice"),
        ({"more_seeds": {"vit6": [3]}}, "more_seeds: 'vit6' is not known.*Did you mean 'vit5'"),
        ({"more_seeds": {"sit": [3]}}, "sit has seed 3, vit5 lacks it; add 'vit5' to more_seeds"),
        ({"score_at": [4, 2]}, r"score_at = \[4, 2\]; list each step once, the last one last"),
        (
            {"score_at": [1, 2]},
            r"score_at = \[1, 2\]; expected multiples of training.log_every = 1 up to .*num_steps = 4",
        ),
        ({"replicate": "backbone", "score_at": [4]}, "replicate: 'backbone' is not known"),
        ({"grid": {"width": {"x": {}}}, "replicate": "width"}, "replicate has no effect without score_at"),
        ({"extrapolate_to": 9}, "extrapolate_to has no effect without replicate"),
        ({"gird": {}}, "unknown key 'gird'"),
        ({"base": "absent.yaml"}, "absent.yaml: No such file"),
    ],
)
def test_bad_studies_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    study = write_study(tmp_path, **({"baseline": {}} | changes if "grid" in changes else changes))
    with pytest.raises(UserError, match=message) as caught:
        read_study(study)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_are_valid(study: Path) -> None:
    plan, runs = read_study(study)
    assert f"{len(runs)} runs" in study.read_text()
    assert len(plan.seeds) >= 3 or study.stem == "levers_rates"


def test_rates_are_those_of_the_same_levers_from_another_seed() -> None:
    paths = [path for path in STUDIES if path.stem in ("levers", "levers_rates")]
    levers, rates = (validate(StudyConfig, read_yaml(path), path.stem) for path in paths)
    rate = "training.learning_rate"
    alone = {level: {key: v for key, v in keys.items() if key != rate} for level, keys in levers.grid["lever"].items()}
    together = alone.pop("Muon + logit-normal t")
    assert alone == rates.grid["lever"]
    assert together == alone["Muon"] | alone["logit-normal t"]
    tried = {keys[rate] for keys in rates.grid["rate"].values()}
    assert {keys[rate] for keys in levers.grid["lever"].values()} <= tried
    assert not set(levers.seeds) & set(rates.seeds)


def test_equal_flops_are_equal() -> None:
    (path,) = (path for path in STUDIES if path.stem == "backbones")
    _, runs = read_study(path)

    def flops(run: Run) -> int:
        return run_cost(run.config).training_flops * run.config.training.num_steps

    spent = {run.name.removesuffix(", seed 0"): flops(run) for run in runs if run.seed == 0}
    equal = [name for name in spent if "equal FLOPs" in name]
    assert len(equal) == 2
    for name in equal:
        assert spent[name] == pytest.approx(spent["vit5"], rel=5e-3)
        assert spent[name] != pytest.approx(spent[name.removesuffix(", equal FLOPs")], rel=5e-2)
