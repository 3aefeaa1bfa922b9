"""Conformance tests of OpenAI's Images API, for any server, over HTTP alone.

Shares no code with the gateway: every server is tested as a client sees it. Rules for what HyperGen adds to the API
are marked as extensions.
"""
