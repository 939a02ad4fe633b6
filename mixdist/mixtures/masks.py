"""Dropout masks over the components of a mixture, and what they cost.

Shape letters: B rows on this rank, E components.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mixdist.noise import TRIAL_PHASE, Moment

Kind = Literal["none", "gaussian", "gumbel"]
KINGMA = (1.16145124, -1.50204118, 0.58629921)
"""c1, c2, c3 of equation 19 (Kingma et al. 2015, appendix C), for t from 0 to 1."""
MOLCHANOV = (0.63576, 1.87320, 1.48695)
"""k1, k2, k3 of Molchanov et al. 2017, equation 14, for any t."""
KEPT = {"gaussian": 0.8, "gumbel": 0.1}
"""A component counts as kept where its mask is at least this."""


class Masks(nn.Module):
    """Masks m_ni of rows n and components i, drawn for each row, with learned dropout rates p.

    - gaussian: m ~ N(1, t) with t = p / (1 - p), at least 1e-6 (seed document 002, section III-C, equation 16); costs
      KL(q(m) || p(m)), by equation 19 (``polynomial``, where t is at most 1) or, for any t, by Molchanov et al. 2017,
      equation 14 (``sigmoid``); one for each rate. A constant that depends on no parameter is left out of equation 19.
    - gumbel: m = sigmoid((logit(1 - p) + logit u) / T), which is equation 22 with the difference of its two Gumbel
      numbers; costs -``entropy`` H(p) for each rate (equations 23, 24), H(p) the entropy of the rate, nats.

    With ``off_above`` a component is off for good once its rate has been above it in so many steps one after another:
    its mask is then 0, no row is sent to it and it costs nothing. The one with the least rate stays on.

    Args:
        num_components: E.
        kind: none, gaussian or gumbel.
        rates: shared, one p for all components as in the text; each, one for each.
        rate: p at the start.
        temperature: T.
        kl: of gaussian masks, as above.
        entropy: weight of H of gumbel masks.
        learned: whether the rates learn.
        off_above: the rate above which a component goes off, between 0 and 1; unset, none does.
        off_after: for how many steps in a row its rate must have been above it.

    Raises:
        ValueError: a rate or temperature out of range; learned rates of a single component, which equation 16 cancels;
            components that go off without rates of their own that learn.

    Examples:
        >>> from mixdist.mixtures import Masks
        >>> Masks(num_components=3, rate=0.5).rates().tolist()
        [0.5, 0.5, 0.5]
    """

    def __init__(
        self,
        num_components: int,
        kind: Kind = "gumbel",
        rates: Literal["shared", "each"] = "shared",
        rate: float = 0.1,
        temperature: float = 0.1,
        kl: Literal["polynomial", "sigmoid"] = "polynomial",
        entropy: float = 1.0,
        learned: bool = True,
        off_above: float | None = None,
        off_after: int = 500,
    ) -> None:
        super().__init__()
        if num_components == 1 and kind != "none" and learned:
            raise ValueError(
                f"mixture.masks ({kind}) of one component cancel in its weight, so that no rate can be learned: leave "
                f"masks out, or set learned to false"
            )
        if not 0 < rate < 1:
            raise ValueError(f"mixture.masks.rate ({rate}) must be between 0 and 1: give 0.1, for example")
        if not 0 < temperature < math.inf:
            raise ValueError(f"mixture.masks.temperature ({temperature}) must be above 0: give 0.1 as the text does")
        if off_above is not None:
            self._check_off(off_above, off_after, kind, rates, learned)
        self.off_above, self.off_after = off_above, off_after
        self.kind, self.temperature, self.kl, self.entropy = kind, temperature, kl, entropy
        self.num_components = num_components
        self.ones_E: Tensor
        self.register_buffer("ones_E", torch.ones(num_components), persistent=False)  # says which device this is on
        if off_above is not None:
            self.above_E: Tensor  # steps in a row with a rate above
            self.register_buffer("above_E", torch.zeros(num_components, dtype=torch.int64))
            self._known: tuple[Tensor | None, int, list[bool]] = (None, 0, [])  # what was read, of which counts
        if kind != "none":
            num = 1 if rates == "shared" else num_components
            logit_P = torch.full((num,), math.log(rate / (1.0 - rate)))
            self.logit_P: Tensor
            if learned:
                self.logit_P = nn.Parameter(logit_P)
            else:
                self.register_buffer("logit_P", logit_P, persistent=False)

    @staticmethod
    def _check_off(off_above: float, off_after: int, kind: Kind, rates: str, learned: bool) -> None:
        if not 0 < off_above < 1:
            raise ValueError(f"mixture.masks.off_above ({off_above}) must be between 0 and 1: give 0.5, for example")
        if off_after < 1:
            raise ValueError(f"mixture.masks.off_after ({off_after}) must be at least 1: give a number of steps")
        if kind == "none" or rates != "each" or not learned:
            raise ValueError(
                f"mixture.masks.off_above ({off_above}) needs a rate of each component that learns, not kind {kind} "
                f"with rates {rates}, learned {learned}: set kind to gumbel, rates to each, learned to true"
            )

    @torch.no_grad()
    def count(self, at: Moment) -> None:
        """Count a step's rates, which are the same on every rank; a step that is only tried does not count."""
        if self.off_above is None or at.phase == TRIAL_PHASE:
            return
        rate_E, off_E = self.rates(), self.above_E >= self.off_after
        above_E = torch.where(off_E, self.above_E, torch.where(rate_E > self.off_above, self.above_E + 1, 0))
        least_E = (
            torch.arange(self.num_components, device=rate_E.device) == rate_E.masked_fill(off_E, torch.inf).argmin()
        )
        stays_E = least_E & (above_E >= self.off_after).all()
        self.above_E.copy_(above_E.masked_fill(stays_E, 0))

    def on(self) -> list[bool]:
        """Return which components are on; a device is read once after each change, in a step once."""
        if self.off_above is None:
            return [True] * self.num_components
        counted, version, found = self._known
        if counted is not self.above_E or version != self.above_E._version:
            found = (self.above_E < self.off_after).tolist()
            self._known = self.above_E, self.above_E._version, found
        return found

    def only_on(self, value: Tensor, off: float) -> Tensor:
        """Return values (..., E) with ``off`` at components that are off."""
        return value if self.off_above is None else value.masked_fill(self.above_E >= self.off_after, off)

    def rates(self) -> Tensor:
        """Return p of each component, (E,); zeros without masks."""
        if self.kind == "none":
            return torch.zeros_like(self.ones_E)
        return torch.sigmoid(self.logit_P).expand(self.num_components)

    def log_masks(self, uniform_BE: Tensor) -> Tensor:
        """Return log m, (B, E), of independent uniform numbers on (0, 1): 0 without masks, -inf of what is off."""
        if self.kind == "none":
            return torch.zeros_like(uniform_BE)
        if self.kind == "gumbel":
            logit_u = torch.special.logit(uniform_BE)
            found = nn.functional.logsigmoid((logit_u - self.logit_P) / self.temperature)
        else:
            deviation = torch.exp(0.5 * self._log_t())
            found = torch.log((1.0 + deviation * torch.special.ndtri(uniform_BE)).clamp(min=1e-6))
        return self.only_on(found, -math.inf)

    def _log_t(self) -> Tensor:
        """Return log t = logit p of gaussian masks: at most 0 under equation 19, which falls without end above."""
        return self.logit_P if self.kl == "sigmoid" else self.logit_P.clamp(max=0.0)

    def cost(self) -> Tensor:
        """Return what the rates cost, nats: a term of the whole batch."""
        if self.kind == "none":
            return self.ones_E.new_zeros(())
        if self.kind == "gumbel":
            p = torch.sigmoid(self.logit_P)
            return -self.entropy * (torch.special.entr(p) + torch.special.entr(1.0 - p)).sum()
        log_t = self._log_t()
        if self.kl == "sigmoid":
            k1, k2, k3 = MOLCHANOV
            return (k1 - k1 * torch.sigmoid(k2 + k3 * log_t) + 0.5 * nn.functional.softplus(-log_t)).sum()
        t = log_t.exp()
        return -(0.5 * log_t + KINGMA[0] * t + KINGMA[1] * t**2 + KINGMA[2] * t**3).sum()

    def mean(self) -> Tensor:
        """Return the mean of each component's mask, (E,): 1 - p of gumbel masks as T goes to 0, else 1; 0 when off."""
        return self.only_on(1.0 - self.rates() if self.kind == "gumbel" else self.ones_E, 0.0)

    def kept(self) -> Tensor:
        """Return the probability that each component is kept, P(m >= KEPT), (E,): its sum is the selected K.

        Gaussian: Phi((1 - 0.8) / sqrt t); gumbel: sigmoid(logit(1 - p) + T log 9).
        """
        if self.kind == "none":
            return self.ones_E
        if self.kind == "gumbel":
            least = KEPT[self.kind]
            found = torch.sigmoid(-self.logit_P - self.temperature * math.log(least / (1.0 - least)))
        else:
            found = torch.special.ndtr((1.0 - KEPT[self.kind]) * torch.exp(-0.5 * self._log_t()))
        return self.only_on(found.expand(self.num_components), 0.0)
