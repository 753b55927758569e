"""The server: an OpenAI-compatible HTTP API over one engine a model. `lm serve` runs it; `make_app` builds it."""
