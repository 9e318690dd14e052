"""The OpenAI-compatible server: HTTP in front of one engine. Never imports torch itself."""
