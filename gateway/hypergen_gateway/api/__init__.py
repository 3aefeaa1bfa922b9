"""The OpenAI-compatible routes: request bodies in, response bodies out."""
