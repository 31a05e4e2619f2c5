"""The objective of flow matching: predict the velocity from noise to data (SiT, arXiv 2401.08740, eq. 5)."""

from torch import Tensor

from vit5gen.flow import Flow
from vit5gen.models import SiTTransformer2DModel
from vit5gen.training.objectives.objective import Batch, Objective, register_objective


@register_objective("flow")
class FlowMatching(Objective):
    """``|v(x_t, t) - (x1 - x0)|^2`` on the linear path; the section ``flow`` names other paths and predictions."""

    trains_all = True

    def __init__(self, model: SiTTransformer2DModel, flow: Flow) -> None:
        super().__init__(model, flow)
        self.flow = flow

    def forward(self, prediction: Tensor, hidden: dict[int, Tensor], batch: Batch, step: int) -> Tensor:
        """Return the mean square over the elements of each sample, (B,)."""
        # What the section `flow` adds to the formula below, or puts in its place, is the flow's own.
        if self.flow.prediction != "velocity" or self.flow.direction_weight > 0:
            return self.flow.loss_of(prediction, batch.x_t, batch.velocity, batch.x0, batch.t)
        error = prediction - batch.velocity  # of the path from x0 to x1 at t; on the linear path x1 - x0
        return error.square().flatten(1).mean(1)
