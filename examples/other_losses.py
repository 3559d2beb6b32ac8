"""DPO, IPO, SimPO and ORPO on `linear_logps`: stay with your loss, leave the logits.

    python examples/other_losses.py --loss simpo --steps 10

Each loss below is a function of sequence log-probabilities, which an attached model returns with their gradient. Any
other loss of log-probabilities goes the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from infopo_kernels.integrations.collators import PreferenceCollator, preference_features
from infopo_kernels.integrations.transformers import attach_linear_logps
from infopo_kernels.commands.smollm2 import smollm2_directory
from infopo_kernels.commands.demo.word_problems import word_problems


def dpo(logps: Tensor, ref_logps: Tensor, beta: float = 0.1) -> Tensor:
    """Rafailov et al. 2023, equation 7; log-probabilities are sums."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def ipo(logps: Tensor, ref_logps: Tensor, tau: float = 0.1) -> Tensor:
    """Azar et al. 2023, equation 17; log-probabilities are means over the tokens, as its authors use it."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    return (chosen - rejected - 1 / (2 * tau)).square().mean()


def simpo(logps: Tensor, ref_logps: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Meng et al. 2024, equation 6; means over the tokens, no reference."""
    chosen, rejected = logps.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma).mean()


def orpo(logps: Tensor, ref_logps: Tensor, weight: float = 0.1) -> Tensor:
    """Hong et al. 2024, equations 6 and 7; means over the tokens, no reference."""
    chosen, rejected = logps.chunk(2)
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -chosen.mean() - weight * F.logsigmoid(log_odds).mean()


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "dpo": (dpo, "sum"),
    "ipo": (ipo, "mean"),
    "simpo": (simpo, "mean"),
    "orpo": (orpo, "mean"),
}


def main() -> None:
    """A few steps of plain PyTorch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--loss", choices=sorted(LOSSES), default="dpo")
    parser.add_argument("--model", help="directory or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-5)
    args = parser.parse_args()

    source = args.model or str(smollm2_directory())
    model = attach_linear_logps(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    rows = [pair.row() for pair in word_problems(2 * args.steps, seed=0)]
    features = preference_features(AutoTokenizer.from_pretrained(source), rows, max_length=512)
    batches = [PreferenceCollator()(features[i : i + 2]) for i in range(0, len(features), 2)]
    loss_of, reduction = LOSSES[args.loss]

    with torch.no_grad():
        references = [model(**batch, linear_logps=reduction).logps for batch in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for step, (batch, ref_logps) in enumerate(zip(batches, references, strict=True), start=1):
        logps = model(**batch, linear_logps=reduction).logps
        loss = loss_of(logps, ref_logps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        chosen, rejected = (logps.detach() - ref_logps).mul(100).round().div(100).chunk(2)
        print(f"step {step}: {args.loss} loss {loss:.4f}, log-ratios {chosen.tolist()} over {rejected.tolist()}")


if __name__ == "__main__":
    main()
