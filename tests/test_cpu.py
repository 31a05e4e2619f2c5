"""Products that are faster and still fp32; memory that stays with the process."""

import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_run import make_inputs
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vit5gen.cli import main
from vit5gen.config import TrainingConfig
from vit5gen.models.classifier import ViT5
from vit5gen.models.transformer import SiTTransformer2DModel
from vit5gen.system import cpu
from vit5gen.system.precision import PRECISIONS, exact_float32
from vit5gen.training.process import make_accelerator


@pytest.fixture(autouse=True)
def highest():
    """Begin at torch's default, which trainings in this process may have left."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_fast_products_are_fp32_and_end_with_the_context():
    a, b = (torch.randn(700, 700, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    with cpu.fast_products():
        error = (a @ b - exact).abs().max() / exact.abs().max()
    assert error < 2e-6  # bf16 leaves 2e-3
    assert torch.get_float32_matmul_precision() == before


def test_fast_products_are_not_asked_for_where_they_round(monkeypatch):
    monkeypatch.setattr(cpu, "_rounds_nothing", lambda: False)
    with cpu.fast_products():
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        FakeTensorMode,
        lambda: FlopCounterMode(display=False),
    ],
)
def test_whether_they_round_is_tried_outside_of_modes(mode):
    cpu._rounds_nothing.cache_clear()
    with cpu.fast_products():
        expected = torch.get_float32_matmul_precision()
    cpu._rounds_nothing.cache_clear()
    with mode() as entered, cpu.fast_products():
        assert torch.get_float32_matmul_precision() == expected
    if isinstance(entered, FlopCounterMode):
        assert entered.get_total_flops() == 0


def test_overlapping_contexts_end_with_the_last(monkeypatch):
    monkeypatch.setattr(cpu, "_rounds_nothing", lambda: True)
    first, second = cpu.fast_products(), cpu.fast_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "medium"
    second.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "highest"


def test_torchs_newer_settings_stand():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with cpu.fast_products():
            assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_models_ask_for_them_where_no_gradient_is_recorded(monkeypatch):
    monkeypatch.setattr(cpu, "_rounds_nothing", lambda: True)
    met = []
    generator = SiTTransformer2DModel(sample_size=4, hidden_size=8, num_layers=1, num_attention_heads=2)
    classifier = ViT5(img_size=32, embed_dim=8, depth=1, num_heads=2)
    calls = ((generator, (torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long))),)
    calls += ((classifier, (torch.zeros(1, 3, 32, 32),)),)
    for model, inputs in calls:
        layer = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
        layer.register_forward_hook(lambda *_: met.append(torch.get_float32_matmul_precision()))
        model(*inputs)
        with torch.no_grad():
            model(*inputs)
    assert met == ["highest", "medium"] * 2
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize(
    ("machine", "probe"),
    [("x86_64", (torch.cpu, "_is_avx512_bf16_supported")), ("arm64", (torch.ops.mkldnn, "_is_mkldnn_bf16_supported"))],
)
def test_bf16_is_asked_of_the_processor(machine, probe, has, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(*probe, lambda: has)
    assert cpu.has_bf16() is has


def test_builds_without_onednn_have_no_bf16(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert cpu.has_bf16() is False


def test_training_tells_of_slow_bf16(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    for precision, told in (("bf16", True), ("fp32", False)):
        with pytest.raises(SystemExit):
            main(["train", str(make_inputs(tmp_path / precision)), "--dry-run", "--training.precision", precision])
        assert ("slower than fp32 on this CPU" in capsys.readouterr().out) is told


@pytest.mark.parametrize(
    ("precision", "device", "has", "warns"),
    [("bf16", "cpu", False, True), ("bf16", "cpu", True, False), ("bf16", "cuda", False, False)]
    + [(precision, "cpu", False, False) for precision in ("fp32", "tf32", "fp64")],
)
def test_slow_bf16_is_told(precision, device, has, warns, monkeypatch):
    monkeypatch.setattr(cpu, "has_bf16", lambda: has)
    shown = []
    PRECISIONS[precision].warn_if_slow(torch.device(device), shown.append)
    assert [("bf16" in text, "fp32" in text) for text in shown] == [(True, True)] * warns


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(("large", "mebibytes", "kept"), [(True, 16, True), (False, 16, False), (False, 4, True)])
def test_freed_memory_is_kept(large, mebibytes, kept):
    code = (
        f"import resource, torch; from vit5gen.system.cpu import keep_freed_memory; keep_freed_memory(large={large})\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        f"    [torch.ones({mebibytes} * 2**18) for _ in range(8)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(*[faults() for _ in range(8)])"
    )
    faults = [int(number) for number in subprocess.check_output([sys.executable, "-c", code], text=True).split()]
    once = mebibytes * 2**20 / resource.getpagesize()
    assert faults[0] > once
    assert (once > 10 * faults[-1]) is kept


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_gives_large_blocks_back(checkpointing, tmp_path, monkeypatch):
    met = []
    monkeypatch.setattr("vit5gen.training.process.keep_freed_memory", lambda large: met.append(large))
    make_accelerator(TrainingConfig(gradient_checkpointing=checkpointing, trackers=[]), tmp_path)
    assert met == [not checkpointing]


@pytest.mark.parametrize("gpu", [False, True])
def test_tf32_is_as_before_after_contexts_that_overlap(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    parts = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)

    def settings():
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32  # raise where torch's disagree
        return (*tf32, torch.get_float32_matmul_precision(), *(part.fp32_precision == "tf32" for part in parts))

    for asked in ("highest", "high"):
        torch.set_float32_matmul_precision(asked)
        before = settings()
        first, second = (exact_float32(torch.device("cpu")) for _ in range(2))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        found = settings()
        assert not found[0]
        assert not any(found[3:5])
        assert not (gpu and found[1])
        second.__exit__(None, None, None)
        assert settings() == before
    torch.set_float32_matmul_precision("highest")


def test_other_threads_never_meet_a_precision_that_rounds(monkeypatch):
    monkeypatch.setattr(cpu, "_rounds_nothing", lambda: False)
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    with cpu.fast_products():
        assert torch.get_float32_matmul_precision() == "highest"
    assert asked == []


def test_plain_products_wait_for_the_end_of_fast_ones(monkeypatch):
    monkeypatch.setattr(cpu, "_rounds_nothing", lambda: True)
    met, entered, leave = [], threading.Event(), threading.Event()

    def fast():
        with cpu.fast_products():
            entered.set()
            leave.wait(10)
            met.append(torch.get_float32_matmul_precision())

    def plain():
        with cpu.plain_products(), cpu.fast_products(), cpu.plain_products():  # its own never waits
            met.append("plain")

    with ThreadPoolExecutor(3) as threads:
        threads.submit(fast)
        entered.wait(10)
        waiting = threads.submit(plain)
        while not cpu._PLAIN:
            pass
        after = threads.submit(fast)  # comes after the one that waits
        assert not waiting.done()
        leave.set()
        waiting.result(10)
        after.result(10)
    assert met == ["medium", "plain", "medium"]
    assert torch.get_float32_matmul_precision() == "highest"
