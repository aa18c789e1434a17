"""The continuous mixture of logistics as a transport of standard normal noise: its quantile function.

Shapes are those of :mod:`ppl_vaebm.models.logistic_mixture`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from ppl_vaebm.models.logistic_mixture import MixtureParams, log_logistic, log_sigmoid

# Safeguarded steps halve the step or the bracket: 100 suffice for float64 at the narrowest scale; 15 are usual.
MAX_ITERATIONS = 100
# Two Newton steps from either start of the normal quantile reach float64's precision.
NUM_NORMAL_STEPS = 2
# Below this log probability the normal quantile starts from its asymptote: float32 underflows at -87.
ASYMPTOTIC_LOG_PROB = -60.0
LOG2_E = math.log2(math.e)

# --- the transport -------------------------------------------------------------------------------


def _normal_log_odds(eps: Tensor) -> Tensor:
    """Return the size of the log odds of the normal CDF, ``abs(log Phi(eps) - log Phi(-eps))``."""
    log_tail = torch.special.log_ndtr(-eps.abs())
    log_odds: Tensor = torch.log1p(-log_tail.exp()) - log_tail
    return log_odds


def _mills_ratio(eps: Tensor) -> Tensor:
    """Return the normal's tail probability beyond ``abs(eps)`` over its density there."""
    ratio: Tensor = math.sqrt(math.pi / 2) * torch.special.erfcx(eps.abs() * math.sqrt(0.5))
    return ratio


def _lower_side(eps: Tensor) -> Tensor:
    """Return the factor, 1 or -1, that mirrors the axis so that ``eps`` lies in the lower half."""
    side: Tensor = torch.ones_like(eps).copysign(-eps)
    return side


def _tail_terms(x: Tensor, lifted: Tensor, loc: Tensor, inv_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Split the lower tail at x among the components: ``exp(tau) * w_i * sigmoid(z_i)`` and ``sigmoid(-z_i)``.

    x, with an axis of length 1 for the components, and the means ``loc`` are on the mirrored axis. ``lifted`` are the
    log weights plus tau, the size of the target's log odds, which keeps the terms near 1 at the root.
    """
    z = (x - loc).mul_(inv_scale)
    # exp2 and sigmoid are several times as fast as exp, log and softplus on a CPU.
    terms = z.clamp(max=0).add_(lifted).mul_(LOG2_E).exp2_()
    terms.mul_(z.abs().sigmoid_())
    return terms, z.neg_().sigmoid_()


class _Search(NamedTuple):
    """The state of the root finder, for P mixtures at once."""

    x: Tensor
    """``(P,)``, as are all that have no component axis."""
    low: Tensor
    high: Tensor
    last_move: Tensor
    is_open: Tensor
    """Whether the root is still to be found; where not, x stays, for the next step would be mere rounding."""
    tau: Tensor
    min_scale: Tensor
    lifted: Tensor
    """``(M, P)``; see :func:`_tail_terms`."""
    loc: Tensor
    """``(M, P)``."""
    inv_scale: Tensor
    """``(M, P)``."""

    def log_odds_and_slope(self) -> tuple[Tensor, Tensor]:
        """Evaluate ``g(x) = log F(x) - log S(x) + tau`` and its slope ``f / (F S)``."""
        terms, upper = _tail_terms(self.x, self.lifted, self.loc, self.inv_scale)
        lower_tail = terms.sum(0)
        density = terms.mul_(upper).mul_(self.inv_scale).sum(0)
        upper_tail = (1 - lower_tail * (-self.tau).exp()).clamp_min(torch.finfo(self.x.dtype).eps / 4)
        return (lower_tail / upper_tail).log(), density / (lower_tail * upper_tail)

    def advance(self) -> _Search:
        """Take a Newton step, or bisect where it leaves the bracket or is over half the last move."""
        precision = torch.finfo(self.x.dtype).eps
        g, slope = self.log_odds_and_slope()
        # NaN is above the root, where the lifted tail overflows; an infinite slope is one that overflowed.
        low, high = torch.where(g < 0, self.x, self.low), torch.where(g < 0, self.high, self.x)
        newton = self.x - g / slope
        # The rounding of g counts as a step. Without it a root between components far apart could stop where the
        # density, and with it the gradient, has underflowed, and not at the edge of one of them.
        step = ((g.abs() + precision * self.tau.clamp_min(1)) / slope).masked_fill(slope.isinf(), math.inf)
        is_safe = (newton >= low) & (newton <= high) & (step <= self.last_move / 2)
        # Log densities bend at scale min_scale at the shortest, so a Newton step leaves an error of about its square
        # over min_scale.
        resolution = precision * torch.maximum(self.x.abs(), self.min_scale)
        is_close = step * step <= resolution * self.min_scale
        x = torch.where(is_safe | is_close, newton.clamp(low, high), (low + high) / 2)
        x = torch.where(self.is_open, x, self.x)
        move = (x - self.x).abs()
        is_open = (move > resolution) & ~is_close
        return self._replace(x=x, low=low, high=high, last_move=move, is_open=is_open)

    def select(self, indices: Tensor) -> _Search:
        """Keep some of the mixtures."""
        return _Search(*(value.index_select(-1, indices) for value in self))


def _start(tau: Tensor, log_weights: Tensor, loc: Tensor, log_scale: Tensor) -> _Search:
    """Bracket the root by the components' own quantiles, and start from the logistic of equal mean and variance."""
    scale, weights = log_scale.exp(), log_weights.exp()
    quantiles = torch.addcmul(loc, tau, scale, value=-1)
    low, high = quantiles.amin(0), quantiles.amax(0)
    moment = weights * loc
    mean = moment.sum(0)
    variance = moment.mul_(loc).sum(0) - mean * mean
    spread = (weights.mul_(scale).mul_(scale).sum(0) + variance.clamp_min(0) * (3 / math.pi**2)).sqrt()
    x = (mean - tau * spread).clamp(low, high)
    is_open = torch.ones_like(tau, dtype=torch.bool)
    return _Search(x, low, high, high - low, is_open, tau, scale.amin(0), log_weights + tau, loc, scale.reciprocal_())


@torch.no_grad()
def _solve(tau: Tensor, log_weights: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Find the quantiles of P mixtures at log odds ``-tau``, ``(P,)``, at most 0, to the precision of the dtype.

    Safeguarded Newton on the log odds, where a single logistic is a straight line. The parameters are ``(M, P)``; NaN
    in them gives NaN.
    """
    search = _start(tau, log_weights, loc, log_scale)
    roots = torch.empty_like(tau)
    places = torch.arange(len(tau), device=tau.device)
    for _ in range(MAX_ITERATIONS):
        search = search.advance()
        open_indices = search.is_open.nonzero().squeeze(1)
        if 2 * len(open_indices) <= len(places):
            roots[places] = search.x
            search, places = search.select(open_indices), places[open_indices]
        if not len(places):
            break
    roots[places] = search.x
    return roots


class _FirstDerivative(torch.autograd.Function):
    """A derivative that has none itself.

    torch's ``once_differentiable`` raises only where autograd happens to walk through its node; ``torch.autograd.grad``
    walks around it and returns the other terms. This node stands between the derivative and all it depends on.
    """

    @staticmethod
    def forward(ctx: Any, derivative: Callable[..., Any], *inputs: Tensor) -> Any:
        """Evaluate ``derivative(*inputs)``."""
        return derivative(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        """Raise."""
        raise RuntimeError(
            "expected first derivatives of the quantile transport, got a request for a second, which it does not have; "
            "drop create_graph=True"
        )


class _Quantile(torch.autograd.Function):
    """The x at which a mixture's CDF is the normal CDF at eps, with the implicit gradients.

    From ``F(x; theta) = Phi(eps)``: dx/deps = phi(eps) / f(x) and dx/dtheta = -(dF/dtheta) / f(x). The root finder is
    not differentiated.
    """

    @staticmethod
    def forward(ctx: Any, eps: Tensor, log_weights: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
        """Solve; eps is ``(n, H, W)``, the rest ``(n, M, H, W)`` of equal shape."""
        tau, side = _normal_log_odds(eps), _lower_side(eps)
        blocks = (block.movedim(-3, 0).flatten(1) for block in (log_weights, loc * side.unsqueeze(-3), log_scale))
        x = side * _solve(tau.flatten(), *blocks).view_as(eps)
        ctx.save_for_backward(eps, log_weights, loc, log_scale, x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Multiply by the implicit derivatives."""
        return _FirstDerivative.apply(_quantile_derivative, grad, *ctx.saved_tensors)


def _quantile_derivative(
    grad: Tensor, eps: Tensor, log_weights: Tensor, loc: Tensor, log_scale: Tensor, x: Tensor
) -> tuple[Tensor, ...]:
    side = _lower_side(eps).unsqueeze(-3)
    tau = _normal_log_odds(eps).unsqueeze(-3)
    x = x.unsqueeze(-3)
    inv_scale = (-log_scale).exp()
    terms, upper = _tail_terms(side * x, log_weights + tau, side * loc, inv_scale)
    lower_tail = terms.sum(-3, keepdim=True)
    upper_tail = 1 - lower_tail * (-tau).exp()
    densities = terms * upper * inv_scale
    grad_mass = grad.unsqueeze(-3) / densities.sum(-3, keepdim=True)
    grad_eps = (grad_mass * lower_tail).squeeze(-3) / _mills_ratio(eps)
    # The weights are free here: F is the lower tail over the sum of both.
    grad_log_weights = (log_weights.exp() * upper * lower_tail - terms * upper_tail) * (side * grad_mass)
    grad_loc = densities * grad_mass
    return grad_eps, grad_log_weights, grad_loc, grad_loc * (x - loc)


class _NormalScore(torch.autograd.Function):
    """The eps at which the normal CDF has given log odds."""

    @staticmethod
    def forward(ctx: Any, log_odds: Tensor) -> Tensor:
        """Solve ``log Phi(-abs(eps)) = log sigmoid(-abs(log_odds))`` by Newton steps."""
        log_tail = log_sigmoid(-log_odds.abs())
        square = -2 * log_tail
        # The absolute value is for the half that the first branch does not use.
        asymptote = -(square - (2 * math.pi * square).log()).abs().sqrt()
        eps = torch.where(log_tail < ASYMPTOTIC_LOG_PROB, asymptote, torch.special.ndtri(log_tail.exp()))
        for _ in range(NUM_NORMAL_STEPS):
            eps = eps - (torch.special.log_ndtr(eps) - log_tail) * _mills_ratio(eps)
        eps = torch.where(log_odds > 0, -eps, eps)
        ctx.save_for_backward(log_odds, eps)
        return eps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Multiply by ``Phi(eps) Phi(-eps) / phi(eps)``."""
        return _FirstDerivative.apply(_normal_score_derivative, grad, *ctx.saved_tensors)


def _normal_score_derivative(grad: Tensor, log_odds: Tensor, eps: Tensor) -> Tensor:
    return grad * _mills_ratio(eps) * log_odds.abs().sigmoid()


class QuantileTransport(Transform):
    """The map from standard normal noise to pixels of the mixture, channel after channel.

    ``x_c = F_c^-1(Phi(eps_c))`` with F_c the CDF of channel c given the channels before it: its components' means are
    moved by them, its weights are their posterior given them. So x has the mixture's density exactly when eps is
    standard normal, and each channel's derivative by its noise is ``phi(eps_c) / f_c(x_c)``.

    The map is smooth, but steep between components far apart: the gap of the density is crossed within a
    range of eps as small as the density there. Gradients are the implicit ones; a second derivative raises.

    With a ``cache_size`` of 1 the inverse of a value just made is free; see torch's Transform.
    """

    domain = constraints.independent(constraints.real, 3)
    codomain = constraints.independent(constraints.real, 3)
    bijective = True

    def __init__(self, params: MixtureParams, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.params = params

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantileTransport):
            return False
        mine, others = vars(self.params).values(), vars(other.params).values()
        return all(left is right or torch.equal(left, right) for left, right in zip(mine, others, strict=True))

    @property
    def sign(self) -> int:
        """1: the Jacobian is triangular with a positive diagonal."""
        return 1

    def with_cache(self, cache_size: int = 1) -> QuantileTransport:
        """Return the same map with another cache; see torch's Transform."""
        return self if self._cache_size == cache_size else QuantileTransport(self.params, cache_size)

    def _call(self, eps: Tensor) -> Tensor:
        """Map noise to pixels, ``(n, C, H, W)`` both."""
        log_weights = self.params.log_weights
        values: list[Tensor] = []
        for channel, noise in enumerate(eps.to(log_weights.dtype).unbind(-3)):
            loc = self.params.channel_loc(channel, values)
            log_scale = self.params.log_scale.select(-4, channel)
            blocks = torch.broadcast_tensors(log_weights, loc, log_scale, noise.unsqueeze(-3))[:3]
            values.append(_Quantile.apply(noise, *blocks))
            if channel + 1 < self.params.num_channels:
                log_density = log_logistic(values[-1].unsqueeze(-3), loc, log_scale)
                log_weights = torch.log_softmax(log_weights + log_density, -3)
        return torch.stack(values, -3)

    def _inverse(self, x: Tensor) -> Tensor:
        """Map pixels to noise, ``(n, C, H, W)`` both."""
        loc, log_scale = self.params.conditional_loc(x), self.params.log_scale
        log_densities = log_logistic(x.unsqueeze(-3), loc, log_scale)
        terms = torch.broadcast_tensors(self.params.log_weights, *log_densities.unbind(-4)[:-1])
        log_weights = torch.log_softmax(torch.stack(terms, -4).cumsum(-4), -3)
        z = (x.unsqueeze(-3) - loc) * (-log_scale).exp()
        log_lower, log_upper = (torch.logsumexp(log_weights + log_sigmoid(value), -3) for value in (z, -z))
        eps: Tensor = _NormalScore.apply(log_lower - log_upper)
        return eps

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Evaluate ``sum log phi(eps) - log f(pixels)``, ``(n,)``, nats, for noise x and the pixels y it maps to."""
        log_phi = -0.5 * (x.square() + math.log(2 * math.pi))
        return log_phi.sum((-3, -2, -1)) - self.params.log_density(y)


def logistic_mixture(params: MixtureParams) -> dist.TransformedDistribution:
    """Make the continuous mixture, batch shape ``(n,)``, event shape ``(C, H, W)``, as a transport of noise.

    Its log density is ``params.log_density``, which is the faster call where the noise is not needed.
    """
    zero = params.loc.new_zeros(())
    base = dist.Normal(zero, zero + 1).expand(params.batch_shape + params.event_shape).to_event(3)
    return dist.TransformedDistribution(base, [QuantileTransport(params, cache_size=1)])
