"""A backend that is still being started: a model may take minutes to be exported and loaded."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from hypergen_gateway.errors import UnavailableError
from hypergen_gateway.generation.backend import Backend, GeneratedImage, GenerationRequest, ModelDescription

RETRY_SECONDS = 5.0


class StartingBackend:
    """Whatever is asked of it is unavailable, until it hands over to the backend that has been started."""

    def __init__(self) -> None:
        self._backend: Backend | None = None

    def hand_over_to(self, backend: Backend) -> None:
        """From now on `backend` is asked."""
        self._backend = backend

    @property
    def rejected_loras(self) -> Mapping[str, str]:
        """As `Backend` has it."""
        return self._started().rejected_loras

    async def describe(self) -> ModelDescription:
        """As `Backend` has it."""
        return await self._started().describe()

    async def ready(self) -> bool:
        """As `Backend` has it."""
        return self._backend is not None and await self._backend.ready()

    def generate(self, generation: GenerationRequest) -> AsyncGenerator[GeneratedImage, None]:
        """As `Backend` has it."""
        return self._started().generate(generation)

    async def close(self) -> None:
        """As `Backend` has it."""
        if self._backend is not None:
            await self._backend.close()

    def _started(self) -> Backend:
        if self._backend is None:
            raise UnavailableError("The model is still being exported or loaded. Try again later.", RETRY_SECONDS)
        return self._backend
