"""The share of samples that a judge recognises."""

from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, register_metric


@register_metric("recognised")
class Recognised(Metric):
    """How often the extractor names the class that a sample was drawn as; every class counts the same.

    Beside it, as ``held_out`` and ``ratio``, how often it does so for held-out real images of those classes; the ratio
    is None where it never does.
    """

    needs = ("classes",)
    least = 1

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        assert scan.named is not None
        counts = scan.named.sum(1)
        drawn = counts.nonzero()[:, 0]
        counts, shares = counts[drawn], scan.named.diagonal()[drawn] / counts[drawn].double()
        names, value = [list(extractor.classes)[i] for i in drawn], shares.mean().item()
        held_out = sum(extractor.classes[name] for name in names) / len(names)
        return {
            f"recognised-{extractor.name}": {
                "value": value,
                "n": scan.count,
                "standard_error": (shares * (1 - shares) / counts).sum().sqrt().item() / len(names),
                "classes": dict(zip(names, shares.tolist(), strict=True)),
                "held_out": held_out,
                "ratio": value / held_out if held_out else None,
            }
        }
