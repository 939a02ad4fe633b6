"""A mixture of Gaussians over the rows themselves as a gate.

Shape letters: B rows on this rank, N rows of a start, K clusters (as many as experts), D numbers of a row.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mixdist.arguments import check_arguments
from mixdist.gates.gate import Gate
from mixdist.gates.gaussians import fit_diagonal
from mixdist.gates.latent import check_enough
from mixdist.nets.mlp import flat
from mixdist.terms import Batch, Gating, Spec, real_field


class GMM(Gate):
    """q(k|x) of a mixture of Gaussians, softmax_k(log pi_k + log N(x; m_k, S_k)); its loss is -log p(x), nats.

    Seed document 001, section 2. Over experts with losses -log p_k(y|x) and mixdist.mixtures.SoftMinLoss the sum of
    both losses is exactly -log p(x, y). It learns by gradients like any gate; or ``start: em`` fits it in closed form
    before its first phase: EM for a diagonal mixture on ``start_rows`` rows gives the first clusters, then come
    ``steps`` steps of EM over all training rows, whose statistics add up over rows and ranks. Precisions are U_k U_k^T,
    U_k upper triangular with a diagonal above 0.

    Args:
        spec: the data set's fields.
        num_experts: K.
        covariance: diag or full.
        field: which field it models.
        spread: standard deviation of the first m_k, drawn from a normal distribution.
        start: em, as above; none, as it is.
        start_rows: rows that give the first clusters; of more, so many, chosen by the seed.
        steps: of EM over all training rows.
        min_variance: added to the diagonal of each covariance in EM, as scikit-learn's ``reg_covar``.

    Raises:
        ValueError: a field that does not suit; a number that is not above 0.

    Examples:
        >>> import torch
        >>> from mixdist.gates import GMM
        >>> from mixdist.terms import Field
        >>> gating = GMM({"x": Field((2,), torch.float32)}, num_experts=3)({"x": torch.zeros(5, 2)}, None)
        >>> gating.log_resp_BE.shape, gating.loss_B.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    log_px_is = "density"

    def __init__(
        self,
        spec: Spec,
        num_experts: int,
        covariance: Literal["diag", "full"] = "diag",
        field: str = "x",
        spread: float = 1.0,
        start: Literal["none", "em"] = "none",
        start_rows: int = 20_000,
        steps: int = 50,
        min_variance: float = 1e-6,
    ) -> None:
        check_arguments(GMM.__init__, locals(), "GMM's ")
        super().__init__()
        described = real_field(spec, field, "GMM")
        numbers = {"spread": spread, "start_rows": start_rows, "min_variance": min_variance, "steps": steps}
        for name, value in numbers.items():
            least, told = (0, "from") if name == "steps" else (1e-300, "above")
            if not least <= value < math.inf:
                raise ValueError(f"GMM's {name} ({value}) must be a number {told} 0: give one")
        self.field, self.fields, self.shape = field, (field,), described.shape
        self.num_clusters, self.covariance, self.begins = num_experts, covariance, start
        self.start_rows, self.steps, self.min_variance = start_rows, steps, min_variance
        size = self.num_drawn = described.num_values
        self.logits_K = nn.Parameter(torch.zeros(num_experts))
        self.mean_KD = nn.Parameter(spread * torch.randn(num_experts, size))
        self.log_diagonal_KD = nn.Parameter(torch.zeros(num_experts, size))
        self.upper_KDD: Tensor | None = None
        if covariance == "full":
            self.upper_KDD = nn.Parameter(torch.zeros(num_experts, size, size))

    def factors(self) -> Tensor:
        """Return U_k, (K, D, D), of a full covariance."""
        assert self.upper_KDD is not None
        return self.upper_KDD.triu(1) + torch.diag_embed(self.log_diagonal_KD.exp())

    def log_pi(self) -> Tensor:
        return torch.log_softmax(self.logits_K, 0)

    def log_joint(self, rows: Batch) -> Tensor:
        """Return log pi_k + log N(x; m_k, S_k), (B, K) nats."""
        x = flat(rows[self.field], self.shape)
        off_BKD = x[:, None] - self.mean_KD
        if self.upper_KDD is None:
            white_BKD = off_BKD * self.log_diagonal_KD.exp()
        else:
            white_BKD = torch.einsum("bkd,kde->bke", off_BKD, self.factors())
        constant_K = self.log_diagonal_KD.sum(-1) - 0.5 * self.mean_KD.shape[1] * math.log(2.0 * math.pi)
        return self.log_pi() + constant_K - 0.5 * white_BKD.square().sum(-1)

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        log_joint_BK = self.log_joint(rows)
        log_px_B = log_joint_BK.logsumexp(-1)
        return Gating(log_joint_BK - log_px_B[:, None], -log_px_B)

    def log_weights(self, rows: Batch, eps: Tensor | None) -> Tensor:
        return self.log_joint(rows).logsumexp(-1, keepdim=True)

    def embed(self, rows: Batch) -> Tensor:
        return flat(rows[self.field], self.shape)

    def reconstruct(self, rows: Batch) -> Tensor:
        """Return the mean of the clusters' means under the responsibilities."""
        return (self(rows, None).log_resp_BE.exp() @ self.mean_KD).reshape(-1, *self.shape)

    def sample(self, cluster: Tensor, eps: Tensor) -> Tensor:
        if self.upper_KDD is None:
            off = eps * torch.exp(-self.log_diagonal_KD[cluster])
        else:
            transposed = self.factors().mT[cluster]
            off = torch.linalg.solve_triangular(transposed, eps[..., None], upper=False)[..., 0]
        return (self.mean_KD[cluster] + off).reshape(-1, *self.shape)

    def draw(self, cluster: Tensor, eps: Tensor, uniform: Tensor) -> Tensor:
        return self.sample(cluster, eps)  # without latents there is no more noise

    # EM

    def starts_at(self, stage: str) -> bool:
        return self.begins == "em"

    def check_start(self, num_rows: int) -> None:
        check_enough(self, min(num_rows, self.start_rows), self.num_clusters)

    def check_rows(self, num_rows: int) -> None:
        size = self.mean_KD.shape[1]
        if self.covariance == "full" and num_rows <= size:
            raise ValueError(
                f"GMM's covariance (full) of {size} numbers cannot be found from {num_rows} training rows: give more "
                f"rows than numbers, or set covariance to diag"
            )

    def seen(self, rows: Batch) -> Tensor:
        return self.embed(rows)

    @property
    def em_steps(self) -> int:
        return self.steps if self.begins == "em" else 0

    @torch.no_grad()
    def start(self, seen: Tensor, seed: int) -> None:
        found = fit_diagonal(seen, self.num_clusters, seed)
        self.logits_K.copy_(found.log_pi_K)
        self.mean_KD.copy_(found.mean_KL)
        self.log_diagonal_KD.copy_(-0.5 * found.log_var_KL)
        if self.upper_KDD is not None:
            self.upper_KDD.zero_()

    @torch.no_grad()
    def statistics(self, rows: Batch) -> Tensor:
        """Return sums of r_k, r_k (x - m_k) and of their squares or products, (K, 1 + D + D or D D) float64.

        They are taken about the means as they are: the variance of numbers far from 0 would cancel.
        """
        resp_BK = self.forward(rows, None).log_resp_BE.double().exp()
        off_BKD = flat(rows[self.field], self.shape).double()[:, None] - self.mean_KD.double()
        weighted_BKD = resp_BK[..., None] * off_BKD
        if self.upper_KDD is None:
            second = (weighted_BKD * off_BKD).sum(0)
        else:
            second = torch.stack([w.T @ off for w, off in zip(weighted_BKD.unbind(1), off_BKD.unbind(1), strict=True)])
        return torch.cat([resp_BK.sum(0)[:, None], weighted_BKD.sum(0), second.flatten(1)], dim=1)

    @torch.no_grad()
    def maximise(self, statistics: Tensor) -> None:
        size = self.mean_KD.shape[1]
        total_K, first_KD, second = statistics.double().split([1, size, statistics.shape[1] - size - 1], dim=1)
        total_K = total_K + 10 * torch.finfo(torch.float64).eps  # as scikit-learn has it
        self.logits_K.copy_((total_K[:, 0] / total_K.sum()).log())
        moved_KD = first_KD / total_K
        self.mean_KD.copy_(self.mean_KD.double() + moved_KD)
        if self.upper_KDD is None:
            variance_KD = second / total_K - moved_KD.square() + self.min_variance
            self._check_positive(bool((variance_KD > 0).all()))
            self.log_diagonal_KD.copy_(-0.5 * variance_KD.log())
            return
        covariance = second.reshape(-1, size, size) / total_K[..., None] - moved_KD[:, :, None] * moved_KD[:, None]
        covariance += self.min_variance * torch.eye(size, dtype=torch.float64, device=covariance.device)
        identity = torch.eye(size, dtype=torch.float64, device=covariance.device).expand_as(covariance)
        lower, failed = torch.linalg.cholesky_ex(covariance)
        self._check_positive(not bool(failed.any()))
        factors = torch.linalg.solve_triangular(lower, identity, upper=False).mT
        self.log_diagonal_KD.copy_(factors.diagonal(dim1=1, dim2=2).log())
        assert self.upper_KDD is not None
        self.upper_KDD.copy_(factors.triu(1))

    def _check_positive(self, positive: bool) -> None:
        if not positive:
            raise ValueError(
                f"a step of EM leaves a cluster without variance in some direction at min_variance "
                f"({self.min_variance:g}): raise it, leave out numbers that depend on others, or give fewer clusters"
            )
