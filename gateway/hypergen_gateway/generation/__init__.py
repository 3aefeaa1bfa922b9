"""Image generation, from a validated request to encoded images: the backend's interface, admission, jobs."""
