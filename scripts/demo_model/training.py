"""One training run: optimizers, schedule, steps and checkpoints."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW, Muon, Optimizer

from scripts.demo_model.architecture import CausalLM, ModelShape
from scripts.demo_model.batches import batch
from scripts.demo_model.corpus import REFINING_MIX


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Everything that determines the trained weights."""

    steps: int = 1300
    refining_steps: int = 400
    """Steps that follow with ``REFINING_MIX`` at a low learning rate."""
    tokens_per_step: int = 4096
    row_length: int = 256
    long_row_length: int = 1024
    long_row_period: int = 8
    """Every so many steps the rows are long, so that late positions are trained without paying for them always."""
    muon_learning_rate: float = 0.01
    adam_learning_rate: float = 0.003
    weight_decay: float = 0.05
    warmup_steps: int = 50
    cooldown_share: float = 0.45
    refining_factor: float = 0.5
    """Share of the peak learning rates at which refining starts."""
    seed: int = 1
    threads: int = 2
    shape: ModelShape = field(default_factory=ModelShape)

    @property
    def total_steps(self) -> int:
        return self.steps + self.refining_steps


def learning_rate_factor(step: int, plan: TrainingPlan) -> float:
    """Warm-up, constant, a linear decay to zero over the last ``cooldown_share``; refining decays once more."""
    if step >= plan.steps:
        return plan.refining_factor * (plan.total_steps - step) / plan.refining_steps
    rising = (step + 1) / max(plan.warmup_steps, 1)
    falling = (plan.steps - step) / max(plan.steps * plan.cooldown_share, 1.0)
    return min(1.0, rising, falling)


def build_optimizers(model: CausalLM, plan: TrainingPlan) -> list[Optimizer]:
    """Muon for the projections, AdamW for embedding and norms.

    Muon orthogonalises the momentum of a matrix. With ``match_rms_adamw`` its updates have the size of AdamW's, so one
    scale of learning rates serves both.
    """
    matrices = [value for name, value in model.named_parameters() if name.endswith("proj.weight")]
    others = [value for name, value in model.named_parameters() if not name.endswith("proj.weight")]
    return [
        Muon(matrices, lr=plan.muon_learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=plan.adam_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def weighted_loss(model: CausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats, weighted by the target's weight."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1])
    losses = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    targets = weights[:, 1:].flatten()
    return (losses * targets).sum() / targets.sum()


class Trainer:
    """State of a run; ``step`` counts finished steps."""

    def __init__(self, plan: TrainingPlan, tokenizer: Tokenizer) -> None:
        torch.set_num_threads(plan.threads)
        torch.manual_seed(plan.seed)
        self.plan = plan
        self.tokenizer = tokenizer
        self.model = CausalLM(plan.shape)
        self.optimizers = build_optimizers(self.model, plan)
        self.peaks = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.step = 0

    def set_learning_rates(self) -> None:
        factor = learning_rate_factor(self.step, self.plan)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def next_batch(self) -> tuple[Tensor, Tensor]:
        plan = self.plan
        is_long = self.step % plan.long_row_period == plan.long_row_period - 1
        length = plan.long_row_length if is_long else plan.row_length
        mix = REFINING_MIX if self.step >= plan.steps else None
        return batch(self.tokenizer, f"{plan.seed}-{self.step}", plan.tokens_per_step // length, length, mix)

    def train_step(self) -> float:
        """One update; returns its loss."""
        self.set_learning_rates()
        loss = weighted_loss(self.model, *self.next_batch())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Write a checkpoint; a half-written one never replaces a good one."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same plan."""
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


@dataclass(slots=True)
class Progress:
    """Prints loss, speed and remaining time, smoothed over ``interval`` steps."""

    plan: TrainingPlan
    interval: int = 20
    started: float = field(default_factory=time.perf_counter)
    losses: list[float] = field(default_factory=list)

    def report(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if step % self.interval and step != self.plan.total_steps:
            return
        elapsed = time.perf_counter() - self.started
        speed = len(self.losses) * self.plan.tokens_per_step / elapsed
        left = (self.plan.total_steps - step) * elapsed / len(self.losses)
        recent = self.losses[-self.interval :]
        mean = sum(recent) / len(recent)
        print(
            f"step {step:5d}/{self.plan.total_steps}  loss {mean:.4f}  {speed:6.0f} tokens/s  {left / 60:5.1f} min",
            flush=True,
        )


def run(trainer: Trainer, checkpoint: Path | None, save_every: int = 50) -> None:
    """Train to the end of the plan, from ``checkpoint`` if it exists."""
    if checkpoint and checkpoint.exists():
        trainer.load(checkpoint)
    progress = Progress(trainer.plan)
    while trainer.step < trainer.plan.total_steps:
        loss = trainer.train_step()
        progress.report(trainer.step, loss)
        if checkpoint and trainer.step % save_every == 0:
            trainer.save(checkpoint)
