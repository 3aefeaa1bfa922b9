"""The OpenAI-compatible API: routes, request bodies and response bodies."""
