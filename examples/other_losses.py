"""Preference losses besides InfoPO, from hidden states: DPO, IPO, SimPO, SFT as objectives, ORPO by hand.

    python examples/other_losses.py --loss simpo --steps 10

`linear_preference_loss` takes any objective, and needs fewer products for the gradients. For any other loss of
log-probabilities use `linear_logps`, which returns them with a gradient. ORPO shows this here; docs/objectives.md
writes ORPO as an objective.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from infopo_kernels import DPO, IPO, SFT, SimPO, linear_logps, linear_preference_loss
from infopo_kernels.commands.demo.word_problems import word_problems
from infopo_kernels.commands.smollm2 import smollm2_directory
from infopo_kernels.integrations.collators import PreferenceCollator, preference_features
from infopo_kernels.objectives import Objective

OBJECTIVES: dict[str, Objective] = {"dpo": DPO(), "ipo": IPO(), "simpo": SimPO(), "sft": SFT()}


def orpo(logps: Tensor, weight: float = 0.1) -> Tensor:
    """Hong et al. 2024, equations 6 and 7, of mean log-probabilities, chosen first; no reference."""
    chosen, rejected = logps.chunk(2)
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -chosen.mean() - weight * F.logsigmoid(log_odds).mean()


def hidden_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The hidden states that enter the head, [2B, T, H]."""
    hidden: Tensor = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return hidden


def reference_logps(model: Any, batch: dict[str, Tensor], objective: Objective) -> Tensor | None:
    """[2B] float64, or None for an objective without a reference."""
    if objective.reference == "none":
        return None
    reduction = "mean" if objective.average else "sum"
    with torch.no_grad():
        hidden = hidden_states(model, batch)
        return linear_logps(hidden, model.lm_head.weight, batch["labels"], shift=True, reduction=reduction)


def main() -> None:
    """A few steps of plain PyTorch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--loss", choices=[*OBJECTIVES, "orpo"], default="dpo")
    parser.add_argument("--model", help="directory or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-5)
    args = parser.parse_args()

    source = args.model or str(smollm2_directory())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    rows = [pair.row() for pair in word_problems(2 * args.steps, seed=0)]
    features = preference_features(AutoTokenizer.from_pretrained(source), rows, max_length=512)
    batches = [PreferenceCollator()(features[i : i + 2]) for i in range(0, len(features), 2)]
    objective = OBJECTIVES.get(args.loss)
    references = [None if objective is None else reference_logps(model, batch, objective) for batch in batches]

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for step, (batch, ref_logps) in enumerate(zip(batches, references, strict=True), start=1):
        head, labels, hidden = model.lm_head.weight, batch["labels"], hidden_states(model, batch)
        if objective is None:
            logps = linear_logps(hidden, head, labels, shift=True, reduction="mean")
            loss = orpo(logps)
        else:
            out = linear_preference_loss(hidden, head, labels, objective=objective, ref_logps=ref_logps, shift=True)
            logps, loss = out.logps, out.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        chosen, rejected = logps.detach().mul(100).round().div(100).chunk(2)
        print(f"step {step}: {args.loss} loss {loss:.4f}, log-probabilities {chosen.tolist()} over {rejected.tolist()}")


if __name__ == "__main__":
    main()
