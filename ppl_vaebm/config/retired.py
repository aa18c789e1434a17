"""Options and values of earlier versions, which stored configurations may still have."""

from __future__ import annotations

from collections.abc import Sequence

from ppl_vaebm.errors import InputError

ANY_VALUE = object()
RETIRED: dict[str, object] = {
    "ebm.rung-steps": ANY_VALUE,
    "ebm.guard-patience": 20,
    "ebm.max-energy-sd": 1_000.0,
    "ebm.max-grad-norm": 1e6,
    "ebm.max-saturation": 0.9,
    "ebm.min-exchange": 0.1,
    "ebm.tune-rejection": 0.25,
    "ebm.tune-steps": 500,
    "ebm.latent.batch-size": 512,
    "ebm.latent.num-chains": 128,
    "ebm.latent.store-size": 256,
    "ebm.latent.num-sweeps": 4,
    "ebm.latent.learning-rate": 2e-3,
    "ebm.latent.energy-l2": 1e-5,
    "energy.kind": "auto",
    "kernel.fit-reference": True,
    "model.num-fourier": 0,
    "sampling.kernel.fit-reference": True,
}
"""Options of earlier versions and the constants that replaced them, to which they may still be set. An option that only
a removed objective used may have any value."""
RETIRED_VALUES: dict[tuple[str, str], str] = {
    ("ebm.objective", "ladder"): "use --objective mle with an adjusted kernel, such as mala"
}
"""Values that an option had in earlier versions, with what to use instead."""


def check(prog: str, name: str, texts: Sequence[str]) -> None:
    """Refuse a retired option whose tokens, none for a flag, are not its constant's; ``prog`` begins the message.

    Raises:
        InputError: how to proceed without the option.
    """
    constant = RETIRED[name]
    expected = constant if isinstance(constant, tuple) else (constant,)
    if constant is not ANY_VALUE and [*map(_plain, texts or ["True"])] != [*map(_plain, expected)]:
        raise InputError(
            f"{prog}: option {name} was removed and is always {constant}, found {' '.join(texts) or True}: leave it "
            "out, or use the version of ppl_vaebm that the options are from"
        )


def _plain(value: object) -> object:
    """Make values comparable: ``1``, ``1.0`` and ``"1e0"`` are one number."""
    try:
        return float(str(value))
    except ValueError:
        return str(value)
