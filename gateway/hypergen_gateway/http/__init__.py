"""HTTP handling common to all requests: connections, errors, API keys, protection from other websites."""
