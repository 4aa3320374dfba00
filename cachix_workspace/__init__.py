"""The self-hosted workspace: agents, their tokens, their deployments and their binary caches.

`cachix-workspace serve` (or `python -m cachix_workspace serve`) runs it. Imports point down only:

    __main__  cli                             the command line
    server  tls  app                          gunicorn; certificates; the application, put together
    api  cache_api  sockets                   requests on deployments and logs; caches; websockets
    admission  answers  browsers              who asks, how much; JSON, errors; other sites
    context  hub  websocket  uploads          shared by requests; open sockets, one; open uploads
    logs  deployments  agents  cache  tokens  decisions and queries
    reports  life  narinfo  audit             what is reported, sent, pushed; who did what
    database                                  transactions, migrations
    tables  settings  refusal                 the schema; options; the error of a refused request

The messages of agents and CI are in cachix_protocol.py. The internals of gunicorn and
simple-websocket are overridden in server.py and websocket.py: setup.cfg bounds their versions.
"""
