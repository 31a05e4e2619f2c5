"""What keeps a run: signals, memory, retention, full disks, randomness of backbones, schedules and averages."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import registered_backbones  # noqa: F401
import torch
import yaml
from tiny_run import assert_identical, forget_processes, run, weights
from torch import nn

from vit5gen.config import TrainingConfig, load_config, parse_yaml
from vit5gen.data.images import BrokenImage
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.models import SiTTransformer2DModel
from vit5gen.system.errors import UserError
from vit5gen.training import checkpoint, process
from vit5gen.training.averages import EMA
from vit5gen.training.batches import micro_batches, open_training_data
from vit5gen.training.build import build_model
from vit5gen.training.loop import build_trainer, train_step
from vit5gen.training.monitor import Monitor
from vit5gen.training.optimizers import build_optimizer, learning_rate
from vit5gen.training.process import STOPPED
from vit5gen.training.reference_moments import build_reference
from vit5gen.training.run_folder import RunFolder, to_yaml


@pytest.mark.parametrize(("number", "where"), [(signal.SIGTERM, "write"), (signal.SIGINT, "_generate")])
def test_a_signal_saves_and_the_run_goes_on(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, where: str
) -> None:
    steps = {"training__num_steps": 9, "training__checkpoint_every": 100, "evaluation__every": 6}
    run(config_file, tmp_path / "whole", **steps)
    handler, original = signal.getsignal(number), getattr(Monitor, where)

    def signalled(self: Monitor, *args: Any) -> Any:
        # In the log of step 4, or while the images of step 6 are drawn.
        if (where == "write" and self.trainer.step == 4) or (where == "_generate" and self.folder.log.exists()):
            os.kill(os.getpid(), number)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, where, signalled)
        assert run(config_file, tmp_path / "parts", **steps) == STOPPED
    assert signal.getsignal(number) == handler
    (saved,) = (tmp_path / "parts/checkpoints").iterdir()
    assert saved.name == ("step_00000005" if where == "write" else "step_00000006")
    assert run(config_file, tmp_path / "parts", **steps) == 0
    assert_identical(weights(tmp_path / "whole", 9), weights(tmp_path / "parts", 9))
    evaluations = json.loads((tmp_path / "parts/metrics.json").read_text())["evaluations"]
    assert [entry["step"] for entry in evaluations] == [0, 6, 9]


def test_a_backbone_with_dropout_resumes_bit_for_bit(config_file: Path, tmp_path: Path) -> None:
    changes = {"model__backbone": "dropout", "model__backbone_kwargs": {}, "training__micro_batch_size": 2}
    run(config_file, tmp_path / "whole", training__num_steps=12, **changes)
    run(config_file, tmp_path / "parts", training__num_steps=5, **changes)
    torch.rand(3)  # the state of torch's own generator does not matter
    run(config_file, tmp_path / "parts", training__num_steps=12, **changes)
    assert_identical(weights(tmp_path / "whole", 12), weights(tmp_path / "parts", 12))


def test_out_of_memory_names_the_micro_batch_to_try(config_file: Path, tmp_path: Path) -> None:
    changes = {"model__backbone": "hungry", "model__backbone_kwargs": {}, "training__num_steps": 2}
    with pytest.raises(UserError, match=r"out of memory .* try --training\.micro_batch_size 2,"):
        run(config_file, tmp_path / "run", **changes)
    assert run(config_file, tmp_path / "run", training__micro_batch_size=1, **changes) == 0


def test_retention_keeps_the_newest_and_the_multiples(config_file: Path, tmp_path: Path) -> None:
    kept = {"training__checkpoint_every": 1, "training__keep_last": 2, "training__keep_every": 4}
    run(config_file, tmp_path / "run", **kept)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"step_{step:08d}" for step in (4, 8, 9, 10)]
    # Resumed from an older one on purpose, a run keeps its new checkpoints.
    older = str(tmp_path / "run/checkpoints/step_00000004")
    run(config_file, tmp_path / "run", resume=older, training__num_steps=6, **kept)
    assert (tmp_path / "run/checkpoints/step_00000006").exists()


@pytest.mark.parametrize(
    ("minutes", "evaluation", "fails", "saved"),
    [
        pytest.param(10, 0, False, [4, 8, 10], marks=pytest.mark.slow),
        (10, 3600, False, [4, 6, 10]),  # once after an evaluation, however long
        pytest.param(None, 3600, False, [10], marks=pytest.mark.slow),
        pytest.param(10, 0, True, [], marks=pytest.mark.slow),
    ],
)
def test_the_clock_saves_too(
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minutes: float | None,
    evaluation: float,
    fails: bool,
    saved: list[int],
) -> None:
    now, attempts = 0.0, []

    def pass_time(seconds: float) -> Any:
        def passes(self: Monitor, *args: Any) -> bool:
            nonlocal now
            now += seconds
            return True

        return passes

    def save(*args: Any) -> Path:
        attempts.append(args[1])
        if fails and args[1] < 10:
            raise OSError(28, "No space left on device")
        return original(*args)

    original = checkpoint.save
    monkeypatch.setattr(process, "time", Mock(monotonic=lambda: now))
    monkeypatch.setattr(Monitor, "write", pass_time(250))  # a step
    monkeypatch.setattr(Monitor, "evaluate", pass_time(evaluation))
    monkeypatch.setattr(Monitor, "due", lambda self, step: step == 5)
    monkeypatch.setattr(checkpoint, "save", save)
    steps = {"training__checkpoint_every": 100, "training__keep_last": 100}
    assert run(config_file, tmp_path / "run", training__checkpoint_minutes=minutes, **steps) == 0
    names = [path.name for path in checkpoint.steps(tmp_path / "run/checkpoints")]
    assert names == [checkpoint.step_name(step) for step in (saved or [10])]
    if fails:
        assert attempts == [4, 8, 10]  # a full disk is not asked in every step


@pytest.mark.slow
def test_timed_checkpoints_change_nothing_and_count_as_others_do(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Monitor, "due", lambda self, step: False)
    kept = {"training__keep_last": 2, "training__keep_every": 4}
    run(config_file, tmp_path / "plain", training__checkpoint_minutes=None, **kept)
    run(config_file, tmp_path / "timed", training__checkpoint_minutes=1e-9, **kept)
    assert_identical(weights(tmp_path / "plain", 10), weights(tmp_path / "timed", 10))
    names = [sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in ("plain", "timed")]
    assert [[int(name[5:]) for name in some] for some in names] == [[5, 10], [4, 8, 9, 10]]


def test_the_main_process_alone_decides_on_a_save(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_processes()
    config = load_config(config_file)
    accelerator = process.make_accelerator(config.training, Path())
    source, vae, _ = open_training_data(config, accelerator, None, False)
    trainer = build_trainer(config, accelerator)
    batches = micro_batches(config, source, vae, accelerator)
    assert train_step(trainer, config, batches, save_due=lambda: True).save
    assert not train_step(trainer, config, batches).save
    monkeypatch.setattr(type(accelerator), "is_main_process", False)
    assert not train_step(trainer, config, batches, save_due=lambda: True).save


def test_the_interval_of_checkpoints_is_settled_when_a_run_begins(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = yaml.safe_load(config_file.read_text())
    del settings["training"]["checkpoint_every"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))

    def settled(start: Path | None = None, **overrides: Any) -> tuple[int | None, float | None]:
        overrides = {f"training.{key}": value for key, value in overrides.items()}
        config = load_config(tmp_path / "run.yaml", overrides)
        training = (
            RunFolder(tmp_path / "run").find_start(config, str(start or "auto"), accept_changes=False)[1].training
        )
        return training.checkpoint_every, training.checkpoint_minutes

    every = {0: 1, 1: 1, 4: 1, 5: 2, 150: 38, 40_000: 10_000, 40_001: 10_000, 400_000: 10_000}
    assert {steps: settled(num_steps=steps)[0] for steps in every} == every
    assert settled(checkpoint_every=7, checkpoint_minutes=None) == (7, None)
    monkeypatch.setattr(Monitor, "due", lambda self, step: False)
    run(tmp_path / "run.yaml", tmp_path / "run", training__num_steps=9, training__checkpoint_minutes=3)
    assert [path.name[-1] for path in checkpoint.steps(tmp_path / "run/checkpoints")] == ["6", "9"]
    for start in (None, tmp_path / "run/checkpoints/step_00000006"):
        assert settled(start, num_steps=4000) == (3, 3)  # as it began
        assert settled(start, num_steps=4000, checkpoint_every=8, checkpoint_minutes=None) == (8, None)
        assert settled(start, num_steps=4000, checkpoint_every=None) == (1000, 3)
    shutil.rmtree(tmp_path / "run/checkpoints")  # killed before its first one
    assert settled(num_steps=4000) == (1000, 10)


def test_a_save_that_does_not_fit_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    tensors = {"model": {"a": torch.ones(300_000)}}
    checkpoint.save(tmp_path, 1, tensors, {}, "")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # a real write that fails half-way
    try:
        with pytest.raises(Exception, match="File too large"):
            checkpoint.save(tmp_path, 2, tensors, {}, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.newest_valid(tmp_path) == tmp_path / "step_00000001"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    trainer, child = socket.socketpair()
    with RunFolder(tmp_path / "run").locked():
        if not (number := os.fork()):
            child.send(b"started")
            child.recv(1)  # outlives the lock
            os._exit(0)
        trainer.recv(7)
        with pytest.raises(UserError, match="another process is training"), RunFolder(tmp_path / "run").locked():
            pass
    try:
        with RunFolder(tmp_path / "run").locked():
            pass
    finally:
        trainer.send(b".")
        os.waitpid(number, 0)


def test_one_process_where_two_were_launched_is_noticed(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # all that `accelerate launch --cpu --num_processes 2` leaves
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"):
        run(config_file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_named(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"training\.trackers: wandb is not installed"):
        run(config_file, tmp_path / "run", training__trackers=["wandb"])
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_loss_and_a_grid_of_every_evaluation(config_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(config_file, tmp_path / "run", training__num_steps=2)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Images("samples")] == [0, 2]
    (tmp_path / "run/tensorboard").rename(tmp_path / "run/vit5gen")  # as earlier versions called it
    run(config_file, tmp_path / "run", training__num_steps=3)
    assert not (tmp_path / "run/tensorboard").exists()
    assert len(list((tmp_path / "run/vit5gen").iterdir())) == 2


def test_compilation_and_gradient_checkpointing_reach_the_model(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    original = SiTTransformer2DModel.enable_gradient_checkpointing
    monkeypatch.setattr(SiTTransformer2DModel, "compile_repeated_blocks", lambda self: called.append("compile"))
    monkeypatch.setattr(
        SiTTransformer2DModel,
        "enable_gradient_checkpointing",
        lambda self: (called.append("checkpointing"), original(self)),
    )
    run(config_file, tmp_path / "plain", training__num_steps=3)
    assert called == []
    run(config_file, tmp_path / "on", training__num_steps=3, training__compile=True)
    assert set(called) == {"compile"}  # what is trained, and what draws
    called.clear()
    run(config_file, tmp_path / "less", training__num_steps=3, training__gradient_checkpointing=True)
    assert called == ["checkpointing"]
    assert_identical(weights(tmp_path / "plain", 3), weights(tmp_path / "less", 3))


def test_learning_rates_follow_their_schedule() -> None:
    settings = TrainingConfig(num_steps=110, learning_rate=2.0, warmup_steps=10)
    assert [learning_rate(step, settings) for step in (0, 4, 9, 10, 109)] == [0.2, 1.0, 2.0, 2.0, 2.0]
    cosine = settings.model_copy(update={"schedule": "cosine"})
    assert [learning_rate(step, cosine) for step in (4, 10, 60, 110)] == pytest.approx([1.0, 2.0, 1.0, 0.0])


def test_weight_decay_spares_vectors_tokens_and_what_a_module_names(config_file: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(2, 2, bias=False)

        def no_weight_decay(self) -> set[str]:
            return {"table.weight"}

    model = build_model(load_config(config_file))
    model.add_module("named", Named())
    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    spared = {name for name, parameter in model.named_parameters() if id(parameter) not in decayed}
    assert {"backbone.pos_embed", "backbone.reg_token", "named.table.weight", "patch_embed.bias"} <= spared
    assert "backbone.blocks.0.attn.qkv.weight" not in spared
    assert not any(name.endswith("mlp.fc1.weight") for name in spared)


def test_averages_follow_their_closed_form() -> None:
    model, decays = nn.Linear(3, 1, bias=False).double(), [0.0, 0.5, 0.9, 0.9999]
    ema, path = EMA(model, decays), [model.weight.detach().clone()]
    for step in range(1, 21):
        nn.init.constant_(model.weight, float(step))
        ema.update(step)
        path.append(model.weight.detach().clone())
    for decay in decays:
        expected = decay**20 * path[0] + sum((1 - decay) * decay ** (20 - k) * path[k] for k in range(1, 21))
        assert torch.allclose(dict(ema.items(decay))["weight"], expected, rtol=1e-12)


def test_a_state_of_another_model_is_refused(config_file: Path, tmp_path: Path) -> None:
    run(config_file, tmp_path / "run", training__num_steps=1)
    with pytest.raises(UserError, match=r"model has no '.*' of shape .*; resume with the same model"):
        run(config_file, tmp_path / "run", accept=True, training__num_steps=2, model__hidden_size=48)
    with pytest.raises(UserError, match=r"model has 'backbone.blocks.1.*', which this model lacks; resume with"):
        run(config_file, tmp_path / "run", accept=True, training__num_steps=2, model__num_layers=1)
    assert run(config_file, tmp_path / "run", accept=True, training__num_steps=2, training__precision="fp64") == 0


def test_names_that_look_like_numbers_come_back_as_names(config_file: Path, tmp_path: Path) -> None:
    names = {"data.path": "12e5", "data.classes": ["1e3"], "model.backbone_kwargs": parse_yaml("{gamma_init: 1e-4}")}
    config = load_config(config_file, names)
    assert config.model.backbone_kwargs == {"gamma_init": 1e-4}
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_a_run_without_a_checkpoint_begins_anew_under_another_configuration(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "write", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config_file, tmp_path / "run", training__num_steps=2)
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    (tmp_path / "damaged/config.yaml").write_text("data:\n")
    for folder in ("run", "damaged", "fresh"):
        assert run(config_file, tmp_path / folder, training__num_steps=2, training__seed=5) == 0
    texts = {(tmp_path / name / "metrics.json").read_text() for name in ("run", "damaged", "fresh")}
    assert len(texts) == 1


def test_a_last_step_that_cannot_be_saved_is_an_error(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="the last step was not saved; free some disk space"):
            run(config_file, tmp_path / "run", training__num_steps=2)
    assert run(config_file, tmp_path / "run", training__num_steps=2) == 0
    assert (tmp_path / "run/checkpoints/step_00000002").is_dir()


def test_a_kill_while_the_pipeline_is_replaced_leaves_one(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_file, tmp_path / "run", training__num_steps=2)
    os.replace(tmp_path / "run/pipeline", tmp_path / "run/.pipeline.old")
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "write", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config_file, tmp_path / "run", training__num_steps=3)
    assert load_pipeline(tmp_path / "run").class_name(0) == "circle"


@pytest.mark.parametrize("skip", [False, True])
def test_the_reference_passes_broken_images_over_as_training_does(
    config_file: Path, tmp_path: Path, skip: bool
) -> None:
    sizes = {"evaluation.num_images": 100, "evaluation.num_reference": 100}
    config = load_config(config_file, {"data.on_broken_image": "skip" if skip else "fail", **sizes})
    shutil.copytree(config.data.path or "", tmp_path / "data")
    data = config.data.model_copy(update={"path": str(tmp_path / "data")})
    for split in ("train", "test"):
        (tmp_path / "data" / split / "star" / "0.png").write_bytes(b"no image")
    shutil.rmtree(tmp_path / "data" / "test" / "circle")  # the labels of the others stay
    config = config.model_copy(update={"data": data})
    extractor: Any = Mock(dim=2, identity={}, side_effect=lambda images: Mock(pooled=images.double().flatten(1)[:, :2]))
    if skip:
        reference = build_reference(config, extractor)
        assert torch.bincount(torch.tensor(reference.labels)).tolist() == [0, 4, 3]
    else:
        with pytest.raises(BrokenImage):
            build_reference(config, extractor)


def test_a_signal_to_the_whole_group_spares_the_data_workers(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, workers = Monitor.write, []

    def signalled(self: Monitor, *args: Any) -> None:
        workers[:] = multiprocessing.active_children()
        for worker in workers:
            os.kill(worker.pid or 0, signal.SIGTERM)
            os.kill(worker.pid or 0, signal.SIGINT)
        write(self, *args)

    monkeypatch.setattr(Monitor, "write", signalled)
    monkeypatch.setattr(Monitor, "due", lambda self, step: False)
    assert run(config_file, tmp_path / "run", training__num_steps=9, data__num_workers=1) == 0
    (worker,) = workers
    worker.join(timeout=300)  # a loaded machine takes its time
    assert worker.exitcode == 0, "it neither hangs nor ends by a signal"


def test_an_error_after_the_first_evaluation_keeps_the_run(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Monitor, "write", full)
    with pytest.raises(UserError, match="No space left"):
        run(config_file, tmp_path / "run")
    assert (tmp_path / "run/pipeline").is_dir()


def test_a_resume_that_does_not_fit_changes_nothing(config_file: Path, tmp_path: Path) -> None:
    run(config_file, tmp_path / "run", training__checkpoint_every=2, training__num_steps=4)
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    older = str(tmp_path / "run/checkpoints/step_00000002")
    with pytest.raises(UserError, match="resume with the same model"):
        run(config_file, tmp_path / "run", older, accept=True, model__hidden_size=48)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == files


def test_damaged_lines_of_the_log_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n{"st\x00\xff\n5\n{"step": 3}\n{"step": 4')
    assert [line["step"] for line in RunFolder(tmp_path).lines()] == [1, 3]


def test_a_copy_without_hidden_files_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with RunFolder(tmp_path).locked():
        pass
