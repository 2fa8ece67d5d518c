"""The losses of preference tuning, as functions of log-probabilities.

Each answer is told by the sum of its tokens' log-probabilities under the model that learns, the same under the
reference it must stay near, and its number of tokens. Where the published papers leave a choice, it is TRL's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Each pair's loss, -log sigmoid(beta (chosen - rejected)); both are log-ratios to the reference.

    Source: Rafailov et al. 2023, equation 7.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, n_chosen: Tensor, n_rejected: Tensor, beta: float) -> Tensor:
    """Each pair's loss, (chosen / n_chosen - rejected / n_rejected - 1 / (2 beta))^2; both are log-ratios.

    Source: Azar et al. 2023, equation 17, with log-ratios a token, as its authors advise and TRL computes it.
    """
    return (chosen / n_chosen - rejected / n_rejected - 1 / (2 * beta)) ** 2


def orpo(chosen: Tensor, rejected: Tensor, n_chosen: Tensor, n_rejected: Tensor, beta: float) -> Tensor:
    """Each pair's loss beside that of the chosen text; both are log-probabilities, which no reference is needed for.

    -beta log sigmoid(log odds of chosen - log odds of rejected), odds p / (1 - p) of the mean token's probability p.
    Source: Hong et al. 2024, equations 4 and 7.
    """
    return -beta * F.logsigmoid(_log_odds(chosen / n_chosen) - _log_odds(rejected / n_rejected))


def _log_odds(log_p: Tensor) -> Tensor:
    return log_p - torch.log(-torch.expm1(log_p))


def kto(log_ratio: Tensor, is_desirable: Tensor, kl: float, beta: float) -> Tensor:
    """Each answer's loss, 1 - sigmoid(beta (log_ratio - kl)) where it is desirable, the sign turned where it is not.

    kl: how far the model has gone from the reference, at least 0; no gradient flows through it. Source: Ethayarajh et
    al. 2024, equation 8, with both weights 1.
    """
    sign = torch.where(is_desirable, 1.0, -1.0)
    return 1 - torch.sigmoid(beta * sign * (log_ratio - kl))
