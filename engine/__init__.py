"""The engine: token ids in, token ids out; sequences, KV pages, adapters, kernels. Never sees text."""
