"""Weight-space ensembles of models that share an architecture and a class list."""

from __future__ import annotations

from torch import Tensor

from cfmask.errors import UserError


def interpolate(zero_shot: dict[str, Tensor], fine_tuned: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """WiSE-FT (Wortsman et al., CVPR 2022): (1-α)·θ_zeroshot + α·θ_finetuned over tower and head.

    Raises:
        UserError: the two are not of one architecture.
    """
    if zero_shot.keys() != fine_tuned.keys() or any(zero_shot[k].shape != fine_tuned[k].shape for k in zero_shot):
        raise UserError(
            "These two models have different tensors: weights can be averaged within one architecture only."
        )
    return {key: (1 - alpha) * zero_shot[key] + alpha * fine_tuned[key] for key in zero_shot}
