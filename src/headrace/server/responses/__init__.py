"""OpenAI's Responses API: its items become a conversation, and an answer becomes items."""
