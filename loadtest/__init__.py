"""The load-test harness: Locust users, honest metrics, one report. Talks HTTP to any OpenAI-compatible address."""
