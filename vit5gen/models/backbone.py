"""The plug: the registry of backbones, and what a backbone inherits. docs/backbones.md is its contract in prose."""

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit5gen.config import MOST_WIDTH
from vit5gen.models.positions import Grid
from vit5gen.system.errors import UserError, choose, nearest, short

ENTRY_POINTS = "vit5gen.backbones"
_REGISTRY: dict[str, type[nn.Module]] = {}
T = TypeVar("T", bound=type[nn.Module])


def register_backbone(name: str) -> Callable[[T], T]:
    """Class decorator: make a backbone known as `name`; registering a second class under a name is an error."""

    def register(cls: T) -> T:
        known = _REGISTRY.setdefault(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserError(f"backbone: {name!r} is already registered by {known.__module__}; choose another name.")
        _REGISTRY[name] = cls  # a reloaded module replaces its own class
        return cls

    return register


def backbone_names() -> list[str]:
    """Names of all backbones: those registered here and those that installed packages offer."""
    return sorted(_REGISTRY.keys() | importlib.metadata.entry_points(group=ENTRY_POINTS).names)


def get_backbone(name: str) -> type[nn.Module]:
    """Return the class registered as `name`, loading the entry point of that name if there is one.

    Raises `UserError` for a name that is not known, or that several packages offer.
    """
    choose("backbone", name, backbone_names())
    if name not in _REGISTRY:
        (entry, *others) = importlib.metadata.entry_points(group=ENTRY_POINTS, name=name)
        if any(other.value != entry.value for other in others):
            raise UserError(f"backbone: {name!r} is offered by several packages; uninstall all but one.")
        register_backbone(name)(entry.load())
    return _REGISTRY[name]


def make_backbone(
    name: str,
    hidden_size: int,
    num_layers: int,
    num_attention_heads: int,
    mlp_ratio: float,
    grid: Grid,
    options: dict[str, Any],
) -> nn.Module:
    """Build the backbone called `name`; `options` are its keyword-only arguments, anything else is a `UserError`."""
    cls = get_backbone(name)
    allowed = {p.name: p for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for key, value in options.items():
        if key not in allowed:
            known = f"expected {', '.join(allowed)}" if allowed else "it has none: give {}"
            raise UserError(f"backbone_kwargs: {key!r} is not an option of {name!r}; {known}.{nearest(key, allowed)}")
        _check_kind(key, value, allowed[key])
    return cls(hidden_size, num_layers, num_attention_heads, mlp_ratio, grid, **options)


def _check_kind(key: str, value: Any, option: inspect.Parameter) -> None:
    """Raise `UserError` unless the value is, as the default is, a switch ("off" would count as true) or a number."""
    switch, default = isinstance(value, bool), option.default
    if isinstance(default, bool):
        fits, kind = switch, "a switch; expected true or false"
    elif option.annotation in (int, "int"):
        fits = isinstance(value, int) and not switch and abs(value) <= MOST_WIDTH
        kind = f"a whole number; expected one such as {default}, at most {MOST_WIDTH}"
    elif isinstance(default, int | float):
        fits = isinstance(value, int | float) and not switch and abs(value) < 1e38
        kind = f"a finite number; expected one such as {default}"
    else:
        return
    if not fits:
        raise UserError(f"backbone_kwargs: {key} = {short(value)} is not {kind}.")


class Backbone(nn.Module):
    """Base of backbones made of `blocks`: the loop with gradient checkpointing and taps.

    A subclass sets `blocks`, and its ``forward(tokens, conditioning, grid, taps=(), extra_tokens=None)`` ends in
    `run_blocks`. Deriving from this class is optional: the plain contract is ``forward(tokens, conditioning, grid)``.
    """

    blocks: nn.ModuleList
    gradient_checkpointing = False
    _gradient_checkpointing_func = staticmethod(functools.partial(checkpoint, use_reentrant=False))

    def run_block(self, block: nn.Module, *args: Any) -> Tensor:
        """Apply one block, recomputing its activations in the backward pass if gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def run_blocks(
        self, x: Tensor, num_patches: int, num_kept: int, taps: Sequence[int], *args: Any
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Apply ``block(x, *args)`` in turn to x ``[patches, extra tokens, own tokens]``.

        Returns the patches (B, num_patches, D) and, if there are taps, also ``{k: state after k blocks}`` where a state
        (B, num_kept, D) holds patches and extra tokens. Raises `UserError` for a tap that is no number of blocks.
        """
        for k in taps:
            if not 1 <= k <= len(self.blocks):
                raise UserError(f"taps: {k} is not a number of blocks; expected 1 to {len(self.blocks)}.")
        hidden = {}
        for k, block in enumerate(self.blocks, start=1):
            x = self.run_block(block, x, *args)
            if k in taps:
                hidden[k] = x[:, :num_kept]
        return (x[:, :num_patches], hidden) if taps else x[:, :num_patches]
