"""Text in and out of a model: tokenizer, chat template, streaming detokenizer, stop strings; no torch."""

from headrace.tokenizer.chat_template import ChatTemplate
from headrace.tokenizer.detokenizer import IncrementalDetokenizer
from headrace.tokenizer.stop_strings import StopCheck, StopStringMatcher
from headrace.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "StopCheck", "StopStringMatcher", "Tokenizer"]
