"""agno's DALL-E tools, called as an agent calls them."""

from agno.tools.dalle import DalleTools


def generate(prompt: str) -> str:
    result = DalleTools().create_image(prompt)  # OPENAI_BASE_URL and OPENAI_API_KEY
    if not result.images:
        raise RuntimeError(result.content)
    return str(result.images[0].url)
