"""Greedy answers from an exported folder, with ``transformers`` as an implementation independent of Headrace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Messages = Sequence[dict[str, str]]


class Oracle:
    """The exported model under greedy decoding."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.padding_side = "left"
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def complete(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Continue rendered prompts up to the end token."""
        inputs = self.tokenizer(list(prompts), add_special_tokens=False, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        fresh = output[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(fresh, skip_special_tokens=True)
        return texts

    def render(self, messages: Messages) -> str:
        prompt: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return prompt

    def ask(self, questions: Sequence[str], max_new_tokens: int = 48, batch_size: int = 128) -> list[str]:
        """Single-turn answers."""
        prompts = [self.render([{"role": "user", "content": question}]) for question in questions]
        answers: list[str] = []
        for start in range(0, len(prompts), batch_size):
            answers += self.complete(prompts[start : start + batch_size], max_new_tokens)
        return answers

    def converse(self, questions: Sequence[str], max_new_tokens: int = 220) -> list[str]:
        """Answers to the turns of one conversation, each given all turns before it."""
        messages: list[dict[str, str]] = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            reply = self.complete([self.render(messages)], max_new_tokens)[0]
            messages.append({"role": "assistant", "content": reply})
        return [message["content"] for message in messages[1::2]]
