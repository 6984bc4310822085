"""The tool service: untrusted Python at the price of a fork, over REST, SandboxFusion's API and
MCP.

    app.py, fusion.py, mcp_server.py   routes
      -> service.py                    limits, admission, metrics        sessions.py  live sessions
        -> sandbox/engine.py           launchers, zygotes, slots         isolation.py canaries at
        start

README.md in this folder says how to call it, what it protects from and what it does not.
"""
