"""Load on an OpenAI endpoint, Headrace's or another engine's, and what the answers took. No torch, no tokenizer."""
