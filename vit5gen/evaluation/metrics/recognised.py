"""The share of samples that a judge recognises."""

from torch import Tensor

from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, register_metric


@register_metric("recognised")
class Recognised(Metric):
    """How often the extractor names the class that a sample was drawn as; every class counts the same.

    Beside it, as ``reference`` and ``ratio``, how often it does so for the real images of those classes.
    """

    needs = ("classes",)
    least = 1

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        assert scan.named is not None
        counts = scan.named.sum(1)
        drawn, shares = counts > 0, _shares(scan.named)
        value = shares[drawn].mean().item()
        error = (shares * (1 - shares) / counts)[drawn].sum().sqrt().item() / int(drawn.sum())
        score: Score = {"value": value, "n": scan.count, "standard_error": error}
        score["classes"] = {name: shares[i].item() for i, name in enumerate(extractor.classes) if drawn[i]}
        if reference.named is not None and reference.named.sum(1)[drawn].all():
            real = _shares(reference.named)[drawn].mean().item()
            score |= {"reference": real, "ratio": value / real if real else None}
        return {f"recognised-{extractor.name}": score}


def _shares(named: Tensor) -> Tensor:
    """Return the share of each class (K,) on the diagonal; nan for a class without images."""
    return named.diagonal().double() / named.sum(1)
