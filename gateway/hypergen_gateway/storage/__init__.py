"""Where images that are answered as links are kept."""
