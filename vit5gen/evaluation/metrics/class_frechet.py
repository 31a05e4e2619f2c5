"""The Frechet distance of each class."""

from collections import defaultdict
from collections.abc import Sequence

from vit5gen.evaluation.distances import frechet_of_rows
from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, register_metric
from vit5gen.system.errors import UserError, listed

_WORST = 10


@register_metric("class-fd")
class ClassFrechet(Metric):
    """The mean over classes of the distance of a class's samples to its images among the rows of the reference.

    Of few images of a class it is biased upwards: it ranks classes of equal counts, and compares with nothing else.
    """

    needs = ("rows", "row_labels")
    better = "lower"
    by_default = False

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        assert reference.rows is not None
        if not scan.row_labels:
            raise UserError("metric class-fd: the samples have no classes; give class folders, or an npz with arr_1")
        samples, real = (_indices(own) for own in (scan.row_labels, reference.row_labels))
        several = [one for one in samples if min(len(samples[one]), len(real.get(one, ()))) > 1]
        if len(several) < 2:
            names = " and ".join(f"{len(one)} ({listed(one, 3)})" for one in (samples, real))
            problem = f"classes of samples and reference: {names}; {len(several)} with two images in both"
            raise UserError(f"metric class-fd: {problem}, expected at least 2; label both alike")

        # The worst first.
        found = {one: frechet_of_rows(scan.rows[samples[one]], reference.rows[real[one]]) for one in several}
        worst = {name: found[name] for name in sorted(found, key=lambda one: -found[one])[:_WORST]}
        score = {"n": scan.count, "classes": len(found), "left_out": len(samples.keys() | real.keys()) - len(found)}
        for name, own in (("fewest_samples", samples), ("fewest_references", real)):
            score[name] = min(len(own[one]) for one in several)
        mean = sum(found.values()) / len(found)
        return {f"{extractor.metric}-per-class": {"value": mean} | score | {"worst": worst}}


def _indices(labels: Sequence[str]) -> dict[str, list[int]]:
    indices = defaultdict(list)
    for i, label in enumerate(labels):
        indices[label].append(i)
    return indices
