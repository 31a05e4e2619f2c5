"""Weights of files: state dicts read safely and completely, at addresses that kernels like."""

import argparse
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vit5gen.system.errors import UserError, listed

Weights = Mapping[str, Any] | str | Path

# Under what files keep a state dict, averaged weights first; and what wrapped modules put before their names.
_HOLDERS = ("ema", "ema_model", "model_ema", "state_dict_ema", "model", "net", "state_dict")
_AVERAGED = ("ema_model.", "ema.")
_WRAPPERS = re.compile(r"^((ema_model|ema|model|net|module|_orig_mod)\.)+")


class _LeftOut:
    """Stands in a file for an object of any class: it takes what that is made of, and does nothing with it."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(source: Weights) -> dict[str, Tensor]:
    """Return the state dict of a file or mapping: the EMA weights if there are any, wrappers' prefixes removed.

    Files are .safetensors, or pickles read with ``weights_only=True`` that may hold an `argparse.Namespace`.
    Raises `UserError` for a file that is absent, unreadable or unsafe.
    """
    found: Any = read_tensors(Path(source), "checkpoint") if isinstance(source, str | Path) else source
    state: Any = found if isinstance(found, Mapping) else {None: found}  # a name that is none is refused below
    for _ in _HOLDERS:  # no deeper, for a mapping may hold itself
        state = next((state[key] for key in _HOLDERS if isinstance(state.get(key), Mapping)), state)
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise UserError(f"checkpoint: contains no state dict; expected tensors by name, or under {listed(_HOLDERS)}.")
    state = {key: value for key, value in state.items() if key.startswith(_AVERAGED)} or state
    names = {_WRAPPERS.sub("", key).replace("_orig_mod.", ""): key for key in state}
    if twins := state.keys() - names.values():
        raise UserError(f"checkpoint: holds several models, one with {min(twins)}; save those of one alone")
    return {name: state[key] for name, key in names.items()}


def without(state: Mapping[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Return what does not begin with any of ``prefixes``; raise `UserError` for one with which nothing begins."""
    for prefix in prefixes:
        if not any(key.startswith(prefix) for key in state):
            raise UserError(f"--drop-prefix {prefix}: no weight has a name that begins so; it has {listed(state, 5)}")
    return {key: value for key, value in state.items() if not key.startswith(tuple(prefixes))}


def read_tensors(path: Path, what: str, leave_out: bool = False) -> Any:
    """Return what a file of tensors holds; raise a `UserError` that names ``what`` where it is absent or unsafe.

    leave_out: read past objects of other classes than torch allows, of which nothing is imported or run.
    """
    if not path.is_file():
        raise UserError(f"{what}: {str(path)!r} is not a file; give the path of a .pt, .pth or .safetensors file.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        named = leave_out and zipfile.is_zipfile(path)
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path) if named else []
        with torch.serialization.safe_globals([argparse.Namespace, *((_LeftOut, name) for name in others)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what unpickling makes of a file that is none has no end
        if other := _other_kind(path):
            raise UserError(f"{what}: {str(path)!r} is {other}.") from error
        if unsafe := re.search(r"(?:Unsupported global:|unsupported) GLOBAL (\S+)", str(error)):
            reason, advice = f"it contains {unsafe[1]}", "save only its state dict"
            if what == "checkpoint" and not leave_out and "Unsupported" in unsafe[0]:
                advice += f", as `vit5gen convert {path} --output FOLDER` does"
        elif zipfile.is_zipfile(path) and re.search("Can only (SETITEM|append)|Unsupported operand", str(error)):
            reason, advice = "it holds more than can be read past", "save only its state dict"
        elif "weights_only" in str(error):  # torch advises to read it unsafely
            reason = "it is damaged, or holds something else"
            advice = "give a file of tensors: .pt, .pth or .safetensors"
        else:
            reason, advice = (str(error).strip() or repr(error)).split("\n")[0][:200], "download it again"
        raise UserError(f"{what}: {str(path)!r} cannot be read safely as tensors ({reason}); {advice}.") from error


def _other_kind(path: Path) -> str | None:
    """Return what a file is that is often taken for one of tensors, and what to do; None where it is none of these."""
    try:
        with path.open("rb") as file:
            start = file.read(256)
        names = []
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return None
    size, torch_file = path.stat().st_size, path.suffix != ".safetensors"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run `git lfs pull` in its repository, or download the file itself"
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|!--|html|\?xml|head)", start, re.IGNORECASE):
        return "an HTML page, not the weights (of a login or an error, perhaps); download the file itself"
    if torch_file and start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size:
        return f"a safetensors file with the name of a torch file; rename it to {path.stem}.safetensors"
    if names and not any(name.endswith("/data.pkl") for name in names):
        return f"a zip archive of {listed(names, 3)}, not a torch file; unpack it and give the weights in it"
    if names and not torch_file:
        return f"a torch file with the name of a safetensors file; rename it to {path.stem}.pt"
    return None


def check_fit(what: str, missing: list[str], unexpected: list[str], misshapen: list[str], total: int) -> None:
    """Raise `UserError` with at most five names of each kind, and the likely cause, unless all three are empty.

    `total` is the number of keys that the model has.
    """
    if not (missing or unexpected or misshapen):
        return
    if len(missing) == total:
        cause = "it belongs to another kind of model"
    elif misshapen and not (missing or unexpected):
        cause = "a size that you set differs from the checkpoint's"
    elif missing and unexpected:
        cause = "it is of another version or variant of the model"
    else:
        cause = "it is incomplete" if missing else "it has parts that this variant lacks"
    kinds = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen}
    listing = "; ".join(f"{kind}: {listed(names, 5)}" for kind, names in kinds.items() if names)
    raise UserError(f"checkpoint: does not fit {what}; {listing}. Likely cause: {cause}.")


def load_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load `state`; raise `UserError` unless every key and shape fits and every value is finite."""
    own = model.state_dict()
    missing, unexpected = [key for key in own if key not in state], [key for key in state if key not in own]
    shapes = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state}
    misshapen = [f"{key} {found} for {wanted}" for key, (found, wanted) in shapes.items() if found != wanted]
    check_fit(type(model).__name__, missing, unexpected, misshapen, len(own))
    check_finite("checkpoint", state)
    model.load_state_dict(dict(state))


def check_finite(what: str, state: Mapping[str, Tensor]) -> None:
    """Raise `UserError` with the first tensor that holds NaN or an infinity: every image would be the same nothing."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.is_meta and not (finite := torch.isfinite(tensor)).all():
            found = f"{int((~finite).sum())} of the {tensor.numel()} values of {name} are not finite"
            advice = "use an earlier checkpoint, or download the file again"
            raise UserError(f"{what}: {found}: the training diverged or the file is damaged; {advice}")


def fit_channels(value: Tensor, there: Tensor, patch: int) -> Tensor:
    """Return ``there`` with what ``value`` has of its channels; rows of both are (``patch`` pixels, channels)."""
    rows, fitted = value.unflatten(0, (patch, -1)), there.clone().unflatten(0, (patch, -1))
    channels = min(rows.shape[1], fitted.shape[1])
    fitted[:, :channels] = rows[:, :channels]
    return fitted.flatten(0, 1)


def align(module: nn.Module) -> None:
    """Copy weights out of a mapped file: CPU kernels round otherwise where addresses are not multiples of 64."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
