"""What each precision means, once for training, sampling, costs and cards."""

import threading

import pytest
import torch
from torch import nn

from vit5gen.config import TrainingConfig
from vit5gen.system import cpu
from vit5gen.system.precision import PRECISIONS, exact_float32, precision_of, resolve


@pytest.fixture(autouse=True)
def products():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_configuration_and_table_name_the_same():
    assert {"auto", *PRECISIONS} == set(TrainingConfig.model_fields["precision"].annotation.__args__)


@pytest.mark.parametrize(
    ("name", "products", "product", "weights", "activations", "cast"),
    [
        ("fp64", "highest", torch.float64, 8, 8, 0),
        ("fp32", "highest", torch.float32, 4, 4, 0),
        ("tf32", "high", torch.float32, 4, 4, 0),
        ("bf16", "high", torch.bfloat16, 4, 2, 2),
    ],
)
def test_training_computes_with_it(name, products, product, weights, activations, cast):
    one = PRECISIONS[name]
    one.set_products()
    assert torch.get_float32_matmul_precision() == products
    with one.autocast(torch.device("cpu")):
        assert nn.Linear(2, 2, dtype=one.weights)(torch.ones(1, 2, dtype=one.weights)).dtype == product
    assert (one.weights.itemsize, one.activation_bytes, one.cast_bytes) == (weights, activations, cast)


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16"])
def test_cards_tell_how_samples_are_drawn(name):
    networks = nn.Linear(2, 2), nn.Linear(2, 2)
    PRECISIONS[name].cast_for_sampling(*networks)
    assert [precision_of(network) for network in networks] == [name, name]
    assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")


@pytest.mark.parametrize("has", [True, False])
def test_auto_is_what_the_device_has_arithmetic_for(has, monkeypatch):
    monkeypatch.setattr("vit5gen.system.cpu.has_bf16", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    found = [resolve("auto", torch.device(device)) for device in ("cpu", "cuda")]
    assert found == (["bf16", "bf16"] if has else ["fp32", "tf32"])
    assert resolve("fp64", torch.device("cpu")) == "fp64"


def test_a_setting_of_one_thread_waits_for_the_exact_part_of_another() -> None:
    network = nn.Linear(2, 2)
    PRECISIONS["fp32"].set_products()
    inside, leave = threading.Event(), threading.Event()

    def work(context) -> None:
        with context:
            inside.set()
            leave.wait()

    for context in (cpu.fast_products(), exact_float32(torch.device("cpu"))):
        inside.clear()
        leave.clear()
        other = threading.Thread(target=work, args=(context,))
        other.start()
        inside.wait()
        before = precision_of(network)  # whatever the other thread computes by
        PRECISIONS["tf32"].set_products()
        leave.set()
        other.join()
        assert before == "fp32"
        assert precision_of(network) == "tf32"  # nor does its end undo what was set meanwhile
        PRECISIONS["fp32"].set_products()
