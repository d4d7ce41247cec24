"""The gateway: OpenAI's HTTP surface in front of engines. Everything a person can read; no torch."""
