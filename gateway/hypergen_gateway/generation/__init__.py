"""From a validated request to encoded images: the backend's interface, the queue, jobs."""
