"""OpenAI's Images API as rules that any server can be held against, over HTTP alone.

Shares no code with the gateway: whatever server is meant, it is seen as a client sees it. Rules about what HyperGen
adds to the API are marked as extensions.
"""
