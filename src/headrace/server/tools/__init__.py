"""Tool calls: what a request may ask for, how a model is told, and its text read back as OpenAI's tool calls."""
