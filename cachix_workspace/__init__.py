"""The self-hosted workspace: agents, their tokens, their deployments and their binary caches.

`cachix-workspace serve` (or `python -m cachix_workspace serve`) runs it. Imports point down only:

    __main__  cli                             the command line
    server  tls  app                          gunicorn; certificates; the application, put together
    api  cache_api  sockets                   requests on deployments and logs; caches; websockets
    agent_sockets  report_sockets  viewers    the handlers of websockets
    admission  answers  browsers              who asks, how much; JSON, errors; other sites
    context  hub  websocket  uploads          shared by requests; open sockets, one; open uploads
    parking  turns                            connections without a thread; threads for what comes
    logs  deployments  agents  cache  tokens  decisions and queries
    reports  life  narinfo  audit             what is reported, sent, pushed; who did what
    database                                  transactions, migrations
    tables  settings  refusal                 the schema; options; the error of a refused request

The messages of agents and CI are in cachix_protocol.py. Internals of gunicorn are overridden in
server.py: setup.cfg bounds its version.
"""
