"""Storage for images that are returned as links."""
