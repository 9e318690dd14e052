"""Command line of the training run: ``python -m scripts.demo_model.train``."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.demo_model.export import export
from scripts.demo_model.tokenizer import train_tokenizer
from scripts.demo_model.training import Trainer, TrainingPlan, run

PACKAGE_FOLDER = Path(__file__).resolve().parents[2] / "src" / "headrace" / "demo_model"


def parse_arguments() -> argparse.Namespace:
    defaults = TrainingPlan()
    parser = argparse.ArgumentParser(description="Train the demo model and write it as a Hugging Face folder.")
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, help="steps before refining (default: %(default)s)"
    )
    parser.add_argument(
        "--refining-steps", type=int, default=defaults.refining_steps, help="steps after them (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, help="seed of text and weights (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=defaults.threads, help="CPU threads; weights depend on it")
    parser.add_argument("--output", type=Path, default=PACKAGE_FOLDER, help="folder to write (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="file to resume from and to save progress in")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    plan = TrainingPlan(
        steps=arguments.steps,
        refining_steps=arguments.refining_steps,
        seed=arguments.seed,
        threads=arguments.threads,
    )
    tokenizer = train_tokenizer(plan.seed, plan.shape.vocab_size)
    trainer = Trainer(plan, tokenizer)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{parameters:,} parameters, {plan.total_steps * plan.tokens_per_step:,} tokens")
    run(trainer, arguments.checkpoint)
    export(trainer.model, plan.shape, tokenizer, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
