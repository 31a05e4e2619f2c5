"""Low-rank adapters (LoRA) of a pipeline: their files, and loading, mixing, folding in and removing them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
from diffusers.utils import get_adapter_name
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vit5gen.generation.labels import names_by_id
from vit5gen.models.weights import check_finite, fit_channels
from vit5gen.registry import missing_packages
from vit5gen.system.errors import UserError, nearest, short

ADAPTER = "pytorch_lora_weights.safetensors"  # diffusers' name
FULL = "trained_in_full.safetensors"
ADAPTED = {"_base", "_full", "_unfused"}  # what a pipeline keeps for its transformer's adapters
_CONFIG, _BASE, _NAMES = "lora_adapter_metadata", "base_sha256", "trained_in_full"  # keys of the adapter's header
# What follows from the classes, the latent size and `learn_sigma`: a base may differ there and take the same adapter.
_LABELS = "label_embed.weight"
_OF_THE_DATA = (_LABELS, "head.linear.weight", "head.linear.bias", "backbone.pos_embed")
_CLASSES = ("num_classes", "class_dropout_prob")  # what the transformer's configuration says of them
_KINDS = {_CONFIG: dict, _NAMES: list, "config": dict, "id2label": dict}  # of JSON in the headers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_peft(what: str) -> None:
    """Raise `UserError` where peft is not installed."""
    if missing_packages(["peft"]):
        raise UserError(f'{what} needs peft, which is not installed; run `pip install "vit5gen[lora]"`')


def plain_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a network without its adapters, by the names that they have where there are none."""
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def hash_base(
    state: Mapping[str, Tensor], full: Iterable[str], adapters: Iterable[str], dtypes: Iterable[torch.dtype] = _DTYPES
) -> list[str]:
    """Return the SHA-256 of the weights to which adapters are added, as they are in each of the ``dtypes``.

    full: parameters that are trained beside the adapters. These, label table, positions and output layer do not count.
    adapters: names of their weights; an output layer that has one counts.
    """
    digests = {dtype: hashlib.sha256() for dtype in dtypes}
    left_out = {*_OF_THE_DATA, *full} - {f"{layer}.weight" for layer in _layers(adapters)}
    for name, value in sorted(plain_weights(state).items()):
        if name not in left_out:
            for dtype, digest in digests.items():
                cast = value.detach().to(dtype if value.is_floating_point() else value.dtype).cpu().contiguous()
                digest.update(f"{name} {tuple(cast.shape)}".encode())
                digest.update(cast.reshape(-1).view(torch.uint8).numpy().data)
    return [digest.hexdigest() for digest in digests.values()]


def _layers(adapters: Iterable[str]) -> list[str]:
    """Return the layers that have an adapter, by the names of its weights."""
    return sorted({name.removeprefix("transformer.").split(".lora_")[0] for name in adapters})


@dataclass(frozen=True)
class Full:
    """What is trained in full beside an adapter, with the classes that its label table knows."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]  # of the transformer: num_classes, class_dropout_prob
    id2label: dict[int, str]


@dataclass(frozen=True)
class Adapter:
    """What a run with LoRA has trained, as files.

    weights: the adapters, ``{layer}.lora_A.weight`` (rank, in) and ``{layer}.lora_B.weight`` (out, rank).
    full: parameters trained in full, the label table in any case.  sizes: ``r`` and ``lora_alpha``, as peft calls them.
    base: `hash_base` of the network.
    """

    weights: dict[str, Tensor]
    full: dict[str, Tensor]
    sizes: dict[str, float]
    base: list[str]

    def save(self, folder: Path, config: Mapping[str, Any], id2label: Mapping[int, str]) -> None:
        """Write both files, whose header holds the classes too; config: of the transformer."""
        sizes = {**self.sizes, "target_modules": _layers(self.weights)}
        options = {f"transformer.{key}": value for key, value in sizes.items()}
        header = {"format": "pt", _CONFIG: json.dumps(options), _NAMES: json.dumps(sorted(self.full))}
        header |= {_key(dtype): digest for dtype, digest in zip(_DTYPES, self.base, strict=True)}
        weights = {f"transformer.{name}": value.cpu().contiguous() for name, value in self.weights.items()}
        safetensors.torch.save_file(weights, folder / ADAPTER, header)
        known = {key: config[key] for key in _CLASSES}
        header = {"format": "pt", "config": json.dumps(known), "id2label": json.dumps(dict(id2label))}
        full = {name: value.cpu().contiguous() for name, value in self.full.items()}
        safetensors.torch.save_file(full, folder / FULL, header)


def _key(dtype: torch.dtype) -> str:
    """Return under which name the header holds the hash of weights of this type; what has another is cast to fp32."""
    return _BASE if dtype not in _DTYPES[1:] else f"{_BASE}_{str(dtype).removeprefix('torch.')}"


# Of diffusers' loaders, which are one for each of its models, this is one that knows nothing but a `transformer`.
class LoraMixin(CogVideoXLoraLoaderMixin):
    """diffusers' methods for LoRA of a pipeline whose one network is its ``transformer``.

    An adapter of vit5gen brings its label table, its classes, and what else was trained in full. While it is active
    these take the place of the base's; of several adapters, in the order in which they are named.
    """

    _base: Full | None = None  # what adapters have replaced
    _full: Mapping[str, Full] = MappingProxyType({})  # by the adapter's name
    _unfused: dict[str, Tensor] | None = None

    def load_lora_weights(
        self, source: str | Path | Mapping[str, Tensor], adapter_name: str | None = None, **options: Any
    ) -> None:
        """Load an adapter and activate it.

        source: its folder (e.g. that of a run's pipeline), its file, a name on the hub, or tensors by name.
        options: diffusers': hotswap, low_cpu_mem_usage; weight_name, subfolder; for the hub revision, token, ...
        Raises `UserError` for a file that is absent, damaged, not finite, of another size, or of another base.
        """
        check_peft("load_lora_weights")
        transformer, header = self.transformer, dict[str, Any]()
        chosen: dict[str, Any] = {key: options.pop(key, False) for key in ("hotswap", "low_cpu_mem_usage")}
        adapter_name = adapter_name or get_adapter_name(transformer)

        # What is not the base's, or does not fit it, must not touch it.
        own = plain_weights(transformer.state_dict()) | ({} if self._base is None else self._base.tensors)
        if isinstance(source, Mapping):
            file, where, weights = Path(), "adapter", dict(source)
        else:
            where, (weights, header) = f"adapter {(file := _find(source, options))}", _read(file)
        check_finite(where, weights)
        _check_layers(where, weights, own)
        full = _read_full(file.parent / FULL, header.get(_NAMES, []), own, transformer.config)
        dtype = transformer.dtype if transformer.dtype in _DTYPES else torch.float32
        names = () if full is None else full.tensors
        if _key(dtype) in header and [header[_key(dtype)]] != hash_base(own, names, weights, [dtype]):
            found = "was trained on other weights than this pipeline has, or is already folded into them"
            raise UserError(f"{where} {found}; load the pipeline that its training began with")

        # diffusers adds the adapter; the rest takes the place of what is kept for later.
        chosen |= {"adapter_name": adapter_name, "metadata": header.get(_CONFIG) or None}
        self.load_lora_into_transformer(weights, transformer, _pipeline=self, **chosen)
        self._forget([adapter_name])
        if full is not None:
            if self._base is None:
                known = {key: transformer.config[key] for key in full.config}
                self._base = Full({}, known, self.config.id2label)
            for name in full.tensors:
                self._base.tensors.setdefault(name, own[name])
            self._full = {**self._full, adapter_name: full}
        self._put([adapter_name])

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Activate adapters, each with a weight (default 1), which does not scale what was trained in full."""
        super().set_adapters(adapter_names, adapter_weights)
        self._put([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def disable_lora(self) -> None:
        """Draw as the base does."""
        super().disable_lora()
        self._put([])

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        super().enable_lora()
        self._put(self.get_active_adapters())

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove adapters."""
        super().delete_adapters(adapter_names)
        self._forget([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        self._put(self.get_active_adapters())

    def fuse_lora(self, *args: Any, **options: Any) -> None:
        """Fold the active adapters into the weights, of which a copy is kept in the CPU's memory."""
        if self._unfused is None:
            layers = ((name, one) for name, one in self.transformer.named_parameters() if ".base_layer." in name)
            self._unfused = {name: one.detach().to("cpu", copy=True) for name, one in layers}
        super().fuse_lora(*args, **options)

    def unfuse_lora(self, *args: Any, **options: Any) -> None:
        """Undo `fuse_lora` bit for bit, which a subtraction would not."""
        super().unfuse_lora(*args, **options)
        parameters = dict(self.transformer.named_parameters())
        for name, value in (self._unfused or {}).items():
            parameters[name].data.copy_(value)
        self._unfused = None

    def unload_lora_weights(self) -> None:
        """Remove all adapters; after `fuse_lora` the transformer stays as it is, as in diffusers."""
        super().unload_lora_weights()
        if self._unfused is None:
            self._put([])
        self._forget(self._full)
        self._base = self._unfused = None

    def _forget(self, adapters: Iterable[str]) -> None:
        """Forget what these adapters bring."""
        self._full = {name: full for name, full in self._full.items() if name not in adapters}

    def _put(self, adapters: Iterable[str]) -> None:
        """Put what these adapters bring in place of the base's, except those of weight 0."""
        if self._base is None:
            return
        transformer = self.transformer
        scales = [module.scaling for module in transformer.modules() if hasattr(module, "lora_A")]
        acting = [name for name in adapters if name in self._full and any(scale.get(name) for scale in scales)]
        parameters = plain_weights(dict(transformer.named_parameters()))
        for full in (self._base, *(self._full[name] for name in acting)):
            for name, value in full.tensors.items():
                parameters[name].data = value.to(parameters[name])
            transformer.register_to_config(**full.config)
            transformer.null_label = full.config["num_classes"]
            transformer.label_embed.num_embeddings = len(transformer.label_embed.weight)
            self.register_to_config(id2label=full.id2label)


def _find(source: str | Path, options: dict[str, Any]) -> Path:
    """Return the file of an adapter, fetched from the hub where there is no such path, with what lies beside it."""
    path, inner = Path(source), Path(options.get("subfolder") or "", options.get("weight_name") or ADAPTER)
    if not path.exists():
        known = {key: value for key, value in options.items() if key in signature(snapshot_download).parameters}
        wanted = [inner.as_posix(), inner.with_name(FULL).as_posix()]
        try:
            path = Path(snapshot_download(str(source), allow_patterns=wanted, **known))
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"adapter {source}: neither a path nor on the hub ({reason}); check the name") from error
    return path / inner if path.is_dir() else path


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file and its header; raise `UserError` for one that is absent or damaged."""
    try:
        with safe_open(file, "pt") as found:
            tensors, header = {name: found.get_tensor(name) for name in found.keys()}, found.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}); check the path, or save it again") from error
    for key, kind in _KINDS.items():
        try:
            value = json.loads(header.get(key, json.dumps(kind())))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, kind):
            raise UserError(f"{file}: {key} = {short(header[key])} in its header is no {kind.__name__}; save it again")
        header[key] = value
    return tensors, header


def _read_full(file: Path, names: list[str], own: Mapping[str, Tensor], config: Mapping[str, Any]) -> Full | None:
    """Return what lies beside an adapter, None where its header names nothing; `UserError` where it does not fit.

    own, config: of the transformer.
    """
    if not names:
        return None
    tensors, header = _read(file)
    check_finite(str(file), tensors)

    # Each as it is there, but for the number of rows of the label table, which is that of the adapter's classes.
    fitted = {name: _fit_head(value, own[name], config) for name, value in tensors.items() if name in own}
    for name in map(str, names):
        rows = 1 if name == _LABELS else 0
        if name not in fitted or fitted[name].shape[rows:] != own[name].shape[rows:]:
            raise UserError(f"{file}: {name} does not fit this transformer; load the pipeline that training began with")
    known = {key: header["config"].get(key) for key in _CLASSES}
    classes, dropout = known.values()
    rows = len(fitted.get(_LABELS, ()))
    if not (isinstance(classes, int) and isinstance(dropout, int | float) and classes + (dropout > 0) == rows):
        raise UserError(f"{file}: its header has {known}, which {rows} rows of {_LABELS} do not fit; save it again")
    return Full({name: fitted[name] for name in names}, known, names_by_id(header["id2label"]))


def _fit_head(value: Tensor, there: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return a tensor of the head, whose rows are (patch pixels, channels), with as many channels as one ``there``.

    One may have the half that `learn_sigma` discards; it is then that of ``there``, or left out. Others stay.
    """
    patch = config["patch_size"] ** 2
    used = patch * config["in_channels"]
    if value.shape[1:] != there.shape[1:] or {*value.shape[:1], *there.shape[:1]} != {used, 2 * used}:
        return value
    return fit_channels(value, there.to(value), patch)


def _check_layers(where: str, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise `UserError` unless the matrices of an adapter fit the layers of a transformer with the weights ``own``."""
    if not any(".lora" in name or ".lokr" in name for name in weights):
        raise UserError(
            f"{where} has no weights of LoRA; expected e.g. transformer.backbone.blocks.0.mlp.fc1.lora_A.weight"
        )
    for key in sorted({name.partition(".lora_")[0] for name in weights if ".lokr" not in name}):
        layer, (a, b) = key.removeprefix("transformer."), (weights.get(f"{key}.lora_{side}.weight") for side in "AB")
        if a is None or b is None or layer == key:
            expected = "expected transformer.LAYER.lora_A.weight and transformer.LAYER.lora_B.weight for each layer"
            raise UserError(f"{where} has no pair of matrices for {layer}; {expected}, as in diffusers")
        if (weight := own.get(f"{layer}.weight")) is None:
            raise UserError(f"{where}: this transformer has no layer {layer};{nearest(f'{layer}.weight', own)}")
        if min(a.ndim, b.ndim) < 2 or a.shape[0] != b.shape[1]:
            found = f"lora_A of shape {tuple(a.shape)} and lora_B of {tuple(b.shape)}"
            raise UserError(f"{where}: {layer} has {found}; expected (rank, inputs) and (outputs, rank)")
        for side, value, what in ((1, a, "inputs"), (0, b, "outputs")):
            if value.shape[side] != weight.shape[side]:
                found = f"{layer} is for {value.shape[side]} {what}, this transformer's has {weight.shape[side]}"
                raise UserError(f"{where}: {found}; it belongs to a model of another width or learn_sigma")
