"""What of a model is trained: all, parameters by pattern, or low-rank adapters (LoRA), and these folded in again."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as Uncalled

from vit5gen.config import TrainingConfig
from vit5gen.generation.lora import Adapter, check_peft, hash_base, plain_weights
from vit5gen.models import SiTTransformer2DModel
from vit5gen.system.errors import UserError, listed, nearest

_A, _B = "lora_A.default.weight", "lora_B.default.weight"


def choose_trainable(model: SiTTransformer2DModel, settings: TrainingConfig) -> None:
    """Have only those parameters require a gradient that ``training.trainable`` names, and add the adapters of `lora`.

    A pattern is that of a shell (``*`` stands for dots too) and names parameters, layers, or modules with all that they
    contain. Adapters start from ``training.seed`` and add nothing at first: one of their two matrices is zero (LoRA,
    arXiv 2106.09685). Raises `UserError` for a pattern that matches nothing, and where peft is not installed.
    """
    if settings.trainable == "all":
        return
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if settings.lora is None:
        trained = _match("training.trainable", settings.trainable, names)
    else:
        check_peft("training.trainable = lora")
        from peft import LoraConfig

        trained, options = _match("training.lora.full", settings.lora.full, names), settings.lora
        # An output layer of torch's own attention is not called: its weight is used.
        layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
        linear = [name for name, layer in layers.items() if type(layer) is not Uncalled]
        chosen = _match("training.lora.targets", options.targets, linear)
        if not (targets := [name for name in chosen if f"{name}.weight" not in trained]):
            raise UserError("training.lora.targets: all are trained in full; name fewer in training.lora.full")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model.add_adapter(LoraConfig(**options.sizes, lora_dropout=options.dropout, target_modules=targets))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.replace(".base_layer.", ".") in trained)


def _match(what: str, patterns: Iterable[str], names: list[str]) -> set[str]:
    """Return the names that match any pattern, or lie in a module that does; `UserError` where one has none."""
    found: set[str] = set()
    modules = {name.rsplit(".", count)[0] for name in names for count in range(name.count(".") + 1)}
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not matching:
            expected = f"expected e.g. {listed(names, 3)}.{nearest(pattern, modules)}"
            raise UserError(f"{what}: nothing is called {pattern!r}; {expected}")
        found |= matching
    return found


def fold(state: Mapping[str, Tensor], settings: TrainingConfig) -> dict[str, Tensor]:
    """Return the weights of the pipeline, by their names there: those of the trained model with adapters folded in.

    state: of the model as `choose_trainable` left it. Sums are computed in float64, rounded once.
    """
    if settings.lora is None:
        return dict(state)
    folded, sizes = dict(state), settings.lora.sizes
    for name, value in state.items():
        layer = name.removesuffix("base_layer.weight")
        if layer + _A in state:
            product = state[layer + _B].double() @ state[layer + _A].double()
            folded[name] = (value.double() + sizes["lora_alpha"] / sizes["r"] * product).to(value.dtype)
    return plain_weights(folded)


def adapter_of(
    state: Mapping[str, Tensor], trained: Iterable[str], settings: TrainingConfig, base: list[str] | None = None
) -> Adapter | None:
    """Return what a run with LoRA has trained, None of another run.

    state: of the model as `choose_trainable` left it.  trained: names of the parameters that have an average.
    base: the hashes of an earlier call, since what is not trained stays as it is.
    """
    if settings.lora is None:
        return None
    weights = {name.replace(".default.", "."): value for name, value in state.items() if ".lora_" in name}
    in_full = {"label_embed.weight", *(name for name in trained if ".lora_" not in name)}
    full = {name.replace(".base_layer.", "."): state[name] for name in in_full}
    return Adapter(weights, full, settings.lora.sizes, base or hash_base(state, full, weights))
