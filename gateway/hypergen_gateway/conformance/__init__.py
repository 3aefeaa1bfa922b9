"""OpenAI's Images API as rules, checked against any server over HTTP.

Shares no code with the gateway, so every server is tested as a client sees it. Rules about HyperGen's additions to the
API are marked as extensions.
"""
