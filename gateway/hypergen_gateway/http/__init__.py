"""What is true of every request: connections, errors, keys, browsers."""
