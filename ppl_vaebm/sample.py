"""Draw from a fitted VAEBM: ``python -m ppl_vaebm.sample RUN``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from ppl_vaebm import cli
from ppl_vaebm.config import KernelName
from ppl_vaebm.errors import exits_with_one_sentence
from ppl_vaebm.options import parse

DESCRIPTION = """Draw from a fitted VAEBM by chains from fresh noise, and from its VAE. Writes samples/vaebm.npz,
samples/vae.npz and samples/data.npz (array x, draws first), a PNG of each, and the report."""


@dataclass(frozen=True)
class Options:
    """Options of sample."""

    run: cli.RunFolder
    """Folder of the run."""
    num: int = 10_000
    """Draws."""
    kernel: Annotated[KernelName | None, tyro.conf.arg(aliases=["-k"])] = None
    """Kernel of the chains; the run's sampling kernel if not given."""
    num_steps: int | None = None
    """Steps from fresh noise to a sample; the run's sampling.num-steps if not given."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        cli.positive("num", self.num)
        if self.num_steps is not None:
            cli.positive("num-steps", self.num_steps)


@exits_with_one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: tokens; ``None`` takes those of the process.
    """
    options = parse(Options, sys.argv[1:] if argv is None else argv, "sample", DESCRIPTION)

    import torch

    from ppl_vaebm.figures import save_samples_png
    from ppl_vaebm.inference.sampling import decode_in_blocks, sample_by_chains
    from ppl_vaebm.loading import load_run
    from ppl_vaebm.report import write_report
    from ppl_vaebm.rng import stream

    loaded = load_run(options.run)
    cli.set_threads(loaded.config.threads)
    sampling = loaded.config.sampling
    kernel = sampling.kernel.of(options.kernel or sampling.kernel.name)
    num_steps = options.num_steps or sampling.num_steps
    chains = sample_by_chains(loaded.potential, kernel, num=options.num, steps=[0, num_steps], seed=options.seed)

    test = loaded.data.test
    shown = torch.arange(min(options.num, len(test)))
    sets = {
        "data": test.batch(shown, stream(options.seed, "dequantise")),
        "vae": decode_in_blocks(loaded.potential, chains.positions[0]),
        "vaebm": decode_in_blocks(loaded.potential, chains.positions[num_steps]),
    }
    for name, x in sets.items():
        path = loaded.run.save_npz(name, x=x.numpy())
        save_samples_png(path.with_suffix(".png"), x.numpy())
        print(f"{path}: {len(x)} draws, shape {tuple(x.shape[1:])}")
    print(
        f"{kernel.name}: {num_steps} steps from fresh noise, step size {chains.step_size:.3g}, "
        f"acceptance {chains.acceptance_rate:.2f}, {chains.num_evals:.0f} evaluations a draw"
    )
    print(f"report: {write_report(loaded.run)}")


if __name__ == "__main__":
    main()
