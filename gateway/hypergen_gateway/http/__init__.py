"""HTTP concerns of all requests: connections, errors, API keys, browsers."""
