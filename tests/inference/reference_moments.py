"""Reference moments of a posterior that has none in closed form: a logistic regression on breast-cancer data.

``python tests/inference/reference_moments.py`` writes reference_moments.json beside this file, in about two minutes of
one core. Chains of HMC give the centre and the covariance of a multivariate t distribution, and importance sampling
from that gives the moments and log Z: it shares no code with a kernel, and its weights are bounded. The chains' own
moments have to agree with them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor

from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import to_inference_data
from ppl_vaebm.inference.kernels import hmc
from ppl_vaebm.inference.kernels.base import Potential, init_params
from ppl_vaebm.inference.kernels.chains import run_chains
from ppl_vaebm.inference.kernels.targets import logistic_regression
from ppl_vaebm.rng import stream

PATH = Path(__file__).with_suffix(".json")
SEED, NUM_CHAINS, NUM_WARMUP, NUM_DRAWS = 20_260_101, 32, 200, 1000
NUM_WEIGHTS, BATCH = 1_000_000, 20_000
# Tails heavier than the posterior's, so that weights are bounded; chosen by us.
DEGREES_OF_FREEDOM = 10
MAX_Z = 5.0


class Moments(NamedTuple):
    """Means, variances and their standard errors, each ``(D,)``."""

    mean: Tensor
    mean_error: Tensor
    variance: Tensor
    variance_error: Tensor


def breast_cancer() -> tuple[Tensor, Tensor]:
    """Load scikit-learn's copy of the Wisconsin data: 569 cases.

    Returns:
        Thirty standardised features and a column of ones, ``(569, 31)``, float64; and the labels, ``(569,)``.
    """
    data = load_breast_cancer()
    features = torch.tensor(data.data, dtype=torch.float64)
    standardised = (features - features.mean(0)) / features.std(0, correction=0)
    return torch.cat([standardised, torch.ones(len(features), 1).double()], dim=1), torch.tensor(data.target)


def stored() -> Moments:
    """Read what the script wrote."""
    content = json.loads(PATH.read_text())
    return Moments(*(torch.tensor(content[name], dtype=torch.float64) for name in Moments._fields))


def worst_z(one: Moments, other: Moments) -> float:
    """Compare two independent estimates: the largest difference of a mean or a variance, in standard errors."""
    of_means = (one.mean - other.mean) / torch.hypot(one.mean_error, other.mean_error)
    of_variances = (one.variance - other.variance) / torch.hypot(one.variance_error, other.variance_error)
    return float(torch.cat([of_means, of_variances]).abs().max())


def from_chains(potential: Potential, dim: int) -> tuple[Moments, Tensor, dict[str, float]]:
    """Run splitting HMC from N(0, I): the moments, the draws ``(n, D)``, and what the diagnosis says."""
    start = torch.randn(NUM_CHAINS, dim, generator=stream(SEED, "start"), dtype=torch.float64)
    chains = run_chains(
        hmc.build(potential, jitter=0.2),
        stream(SEED, "chains"),
        start,
        init_params(start, 0.1),
        num_draws=NUM_DRAWS,
        num_warmup=NUM_WARMUP,
        functionals=lambda state: {"q": state.position},
    )
    draws = chains.draws["q"]
    mean = draws.mean((0, 1))
    squares = {"q": draws, "square": (draws - mean).square()}
    chains.draws.update(squares)
    found = diagnostics.summarize(to_inference_data(chains))
    columns = torch.tensor([[row.mean, row.mcse_mean] for row in found], dtype=torch.float64)
    moments = Moments(*columns[:dim].unbind(1), *columns[dim:].unbind(1))
    report = {"max_r_hat": max(row.r_hat for row in found), "min_ess": min(row.ess_bulk for row in found)}
    return moments, draws.flatten(0, 1), report


def from_weights(potential: Potential, draws: Tensor) -> tuple[Moments, dict[str, float]]:
    """Weigh draws of a multivariate t with the mean and covariance of given draws: the moments, and log Z."""
    generator, dim = stream(SEED, "weights"), draws.shape[1]
    positions, logs = [], []
    for _ in range(NUM_WEIGHTS // BATCH):
        position, log_proposal = student_t(generator, draws.mean(0), draws.mT.cov())
        log_reference = -0.5 * position.square().sum(1) - 0.5 * dim * math.log(2 * math.pi)
        positions.append(position)
        logs.append(log_reference - potential(position) - log_proposal)
    position, log_weights = torch.cat(positions), torch.cat(logs)
    weights = log_weights.softmax(0)
    mean = weights @ position
    square = (position - mean).square()
    variance = weights @ square
    mean_error = (weights.square() @ square).sqrt()
    variance_error = (weights.square() @ (square - variance).square()).sqrt()
    ess = float(1 / weights.square().sum())
    log_z = float(log_weights.logsumexp(0)) - math.log(NUM_WEIGHTS)
    report = {"log_z": log_z, "log_z_error": math.sqrt(1 / ess - 1 / NUM_WEIGHTS), "ess_of_weights": ess}
    return Moments(mean, mean_error, variance, variance_error), report


def student_t(generator: torch.Generator, centre: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a batch of a multivariate t distribution: ``(n, D)``, and the log density of each."""
    dim, df = len(centre), DEGREES_OF_FREEDOM
    root = torch.linalg.cholesky(covariance * (df - 2) / df)
    normal = torch.randn(BATCH, dim, generator=generator, dtype=torch.float64)
    # A chi-squared variable with an even number of degrees of freedom is twice a sum of half as many exponential ones.
    uniform = torch.rand(BATCH, df // 2, generator=generator, dtype=torch.float64)
    mixing = df / (-2 * torch.log1p(-uniform).sum(1))
    log_kernel = -0.5 * (df + dim) * torch.log1p(mixing * normal.square().sum(1) / df)
    log_constant = math.lgamma((df + dim) / 2) - math.lgamma(df / 2) - 0.5 * dim * math.log(df * math.pi)
    return centre + mixing.sqrt().unsqueeze(
        1
    ) * normal @ root.mT, log_kernel + log_constant - root.diagonal().log().sum()


def main() -> None:
    """Run the chains, check them against the weights, and write the file."""
    features, labels = breast_cancer()
    potential = logistic_regression(features, labels)
    of_chains, draws, chains_report = from_chains(potential, features.shape[1])
    moments, weights_report = from_weights(potential, draws)
    z = worst_z(moments, of_chains)
    report = chains_report | weights_report | {"largest_z_of_chains": z}
    print(report)
    if not (z < MAX_Z and chains_report["max_r_hat"] <= diagnostics.MAX_R_HAT):
        raise SystemExit("the chains have not converged, or contradict the weights: nothing written")
    content = {
        "data": "sklearn breast_cancer, standardised, and an intercept",
        "seed": SEED,
        "num_weights": NUM_WEIGHTS,
    }
    lists = {name: values.tolist() for name, values in moments._asdict().items()}
    PATH.write_text(json.dumps(content | report | lists, indent=1) + "\n")


if __name__ == "__main__":
    main()
