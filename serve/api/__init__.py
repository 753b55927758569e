"""The HTTP API: requests, responses, one file for each group of endpoints."""
