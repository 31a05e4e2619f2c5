"""What a benchmark is given: how large, how often, and against whom."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Sizes:
    """Sizes of all benchmarks; the defaults are those of the published comparison."""

    repetitions: int = 15
    fresh_repetitions: int = 5  # of what runs in processes of its own
    warm_up: int = 3
    preset: str = "S/2"
    latent_side: int = 32
    num_layers: int | None = None  # of our models; None: the preset's
    batch: int = 16
    image_side: int = 224
    images: int = 8
    scored_side: int = 256
    scored_images: int = 50
    published_steps: int = 250
    drawn_images: int | None = None  # None: as many as the run evaluates
    sides: tuple[int, ...] = (16, 32, 64)  # 64, 256 and 1024 tokens
    batches: tuple[int, ...] = (4, 8, 16)
    gpu_preset: str = "XL/2"
    gpu_batch: int = 32  # of one of the eight GPUs that share the published 256


FULL = Sizes()
QUICK = Sizes(
    repetitions=2,
    fresh_repetitions=1,
    warm_up=1,
    latent_side=4,
    num_layers=1,
    batch=2,
    image_side=32,
    images=1,
    scored_side=32,
    scored_images=2,
    published_steps=3,
    drawn_images=6,
    sides=(4, 8),
    batches=(2, 4),
    gpu_preset="S/2",
    gpu_batch=3,
)


@dataclass(frozen=True)
class Setting:
    """Sizes, and folders that the user names: checkouts of the peers and a trained run; None: not given."""

    sizes: Sizes = FULL
    sit: Path | None = None
    vit5: Path | None = None
    run: Path | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add and print what no row can say."""
        self.notes.append(text)
        print(f"Note: {text}.", flush=True)
